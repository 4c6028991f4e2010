"""Models without numbers, which tell the layers of a checkpoint: by their class, or by names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantization.ops.extras import need

__all__ = ["skeleton_of_config", "skeleton_of_names"]

_TABLES = re.compile(r"embed|^(wte|wpe|shared)$")


def skeleton_of_config(folder: str | os.PathLike[str]) -> nn.Module:
    """The model that the ``config.json`` of a folder names, its parameters on meta, in eval mode.

    Buffers that no file has (of rotary embeddings, say) have their numbers. No code of the folder
    is run.

    Args:
        folder: with a ``config.json`` of transformers.

    Raises:
        ImportError: if transformers or accelerate is not installed.
        ValueError: if transformers has no such class.
    """
    transformers: Any = need("transformers", "transformers")
    accelerate: Any = need("accelerate", "transformers")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names = [str(name) for name in config.architectures or ()]
    found = (getattr(transformers, name, None) for name in names)
    base = transformers.PreTrainedModel
    cls = next((c for c in found if isinstance(c, type) and issubclass(c, base)), None)
    if cls is None:
        raise ValueError(
            f"{folder} is of the class {', '.join(names) or 'none'}, which transformers "
            f"{transformers.__version__} does not have: give the model yourself"
        )
    with accelerate.init_empty_weights(include_buffers=False):
        model: Any = cls(config)
    model.tie_weights()
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


def skeleton_of_names(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> nn.Module:
    """A model whose state dict has those keys, on meta, for checkpoints without a class.

    A key ``*.weight`` of floats in two dimensions is taken for a linear layer ``[out, in]``; for an
    embedding if its name has ``embed`` in it or is ``wte``, ``wpe`` or ``shared``. All else are
    parameters.

    Args:
        shapes: dtype (torch's name) and shape by key.

    Raises:
        ValueError: if a name is both a tensor and a module.

    Example:
        >>> skeleton_of_names({"a.q.weight": ("float32", (4, 8)), "a.q.bias": ("float32", (4,))})
        Module(
          (a): Module(
            (q): Linear(in_features=8, out_features=4, bias=True)
          )
        )
    """
    root = nn.Module()
    for key, (dtype, shape) in shapes.items():
        *path, name = key.split(".")
        parent = root
        for i, step in enumerate(path):
            if step not in parent._modules:
                if step in parent._parameters or not step:
                    raise ValueError(f"{key}: {'.'.join(path[: i + 1])} is a tensor as well")
                parent._modules[step] = _layer(".".join(path[: i + 1]), shapes) or nn.Module()
            parent = parent._modules[step]
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        if name in parent._modules or not name:
            raise ValueError(f"{key} is a module as well as a tensor")
        parent._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return root.eval()


def _layer(name: str, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> nn.Module | None:
    dtype, shape = shapes.get(f"{name}.weight", ("", ()))
    if len(shape) != 2 or dtype not in ("float32", "bfloat16", "float16", "float64"):
        return None
    if _TABLES.search(name.rpartition(".")[2]):
        return nn.Embedding(*shape, device="meta")
    return nn.Linear(shape[1], shape[0], bias=f"{name}.bias" in shapes, device="meta")
