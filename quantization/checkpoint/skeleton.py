"""Models without numbers, which tell the layers of a checkpoint: by their class, or by names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantization.checkpoint.disk.json_files import CheckpointError, read_json
from quantization.ops.extras import need

__all__ = ["skeleton_of_config", "skeleton_of_names"]

_TABLES = re.compile(r"embed|^(wte|wpe|shared)$")
_DEEPEST = 100  # names in a key; torch walks down a model by recursion
_OWN = sorted(vars(nn.Module()))  # every module has these for itself


def skeleton_of_config(folder: str | os.PathLike[str]) -> nn.Module:
    """The model that the ``config.json`` of a folder names, its parameters on meta, in eval mode.

    Buffers that no file has (of rotary embeddings, say) have their numbers. No code of the folder
    is run.

    Args:
        folder: with a ``config.json`` of transformers.

    Raises:
        ImportError: if transformers or accelerate is not installed.
        CheckpointError: if ``config.json`` is none, or transformers can make no model of it.
        ValueError: if transformers has no such class.
    """
    transformers: Any = need("transformers", "transformers")
    accelerate: Any = need("accelerate", "transformers")
    path = Path(folder) / "config.json"
    names = read_json(path).get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: architectures is {names!r:.80}; expected a list of names")
    with _told(path):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    found = (getattr(transformers, name, None) for name in names)
    base = transformers.PreTrainedModel
    cls = next((c for c in found if isinstance(c, type) and issubclass(c, base)), None)
    if cls is None:
        raise ValueError(
            f"{folder} is of the class {', '.join(names) or 'none'}, which transformers "
            f"{transformers.__version__} does not have: give the model yourself"
        )
    with _told(path), accelerate.init_empty_weights(include_buffers=False):
        model: Any = cls(config)
    model.tie_weights()
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.eval()


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Transformers takes a config apart as it goes: whatever it stumbles over is the config's."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"transformers can make no model of {path}: {type(error).__name__}: {error}"
        ) from error


def skeleton_of_names(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> nn.Module:
    """A model whose state dict has those keys, on meta, for checkpoints without a class.

    A key ``*.weight`` of floats in two dimensions is taken for a linear layer ``[out, in]``; for an
    embedding if its name has ``embed`` in it or is ``wte``, ``wpe`` or ``shared``. All else are
    parameters.

    Args:
        shapes: dtype (torch's name) and shape by key.

    Raises:
        CheckpointError: for a key that no module can have: with an empty name in it, with one of
            torch's own (``training``), with very many, or both a tensor and a module.

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
        *path, name = _steps(key)
        parent = root
        for i, step in enumerate(path):
            if step not in parent._modules:
                if step in parent._parameters:
                    raise CheckpointError(f"{key}: {'.'.join(path[: i + 1])} is a tensor as well")
                parent._modules[step] = _layer(".".join(path[: i + 1]), shapes) or nn.Module()
            parent = parent._modules[step]
        if name in parent._modules:
            raise CheckpointError(f"{key} is a module as well as a tensor")
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        parent._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return root.eval()


def _steps(key: str) -> list[str]:
    """The names that a key is made of, if modules and tensors can have them."""
    steps = key.split(".")
    wrong = [step for step in steps if not step or step in _OWN]
    if wrong or len(steps) > _DEEPEST:
        why = f"{wrong[0]!r} among its names" if wrong else f"{len(steps)} names"
        raise CheckpointError(
            f"the tensor {key!r:.80} has {why}; there are at most {_DEEPEST}, none of them empty "
            "or what every module has (training, _parameters, ...): rename it, or give the model"
        )
    return steps


def _layer(name: str, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> nn.Module | None:
    dtype, shape = shapes.get(f"{name}.weight", ("", ()))
    if len(shape) != 2 or dtype not in ("float32", "bfloat16", "float16", "float64"):
        return None
    if _TABLES.search(name.rpartition(".")[2]):
        return nn.Embedding(*shape, device="meta")
    return nn.Linear(shape[1], shape[0], bias=f"{name}.bias" in shapes, device="meta")
