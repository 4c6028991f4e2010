"""Models without numbers, which tell the layers of a checkpoint: by their class, or by names."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantization.checkpoint.disk.json_files import CheckpointError, read_json
from quantization.ops.extras import need

__all__ = [
    "computed_tensor",
    "first_float",
    "is_of_transformers",
    "skeleton_of_config",
    "skeleton_of_names",
]

_TABLES = re.compile(r"embed|^(wte|wpe|shared)$")
_DEEPEST = 100  # names in a key; torch walks down a model by recursion
_OWN = sorted(vars(nn.Module()))  # every module has these for itself


def is_of_transformers(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` names a class of transformers; that of diffusers, say, does not.

    Example:
        >>> is_of_transformers({"model_type": "bert"}), is_of_transformers({"_class_name": "UNet"})
        (True, False)
    """
    return "model_type" in config or "architectures" in config


def first_float(dtypes: Iterable[str]) -> str | None:
    """The first dtype of floats among names of dtypes.

    Example:
        >>> first_float(["int64", "bfloat16", "float32"])
        'bfloat16'
    """
    return next((name for name in dtypes if getattr(torch, name).is_floating_point), None)


def skeleton_of_config(folder: str | os.PathLike[str], dtype: str | None = None) -> nn.Module:
    """The model that the ``config.json`` of a folder names, its parameters on meta, in eval mode.

    Buffers that no file has (of rotary embeddings, say) have their numbers. No code of the folder
    is run.

    Args:
        folder: with a ``config.json`` of transformers.
        dtype: of the floats in files, by torch's name; of the model's where the config says none.

    Raises:
        ImportError: if transformers or accelerate is not installed.
        CheckpointError: if ``config.json`` is none, or transformers can make no model of it.
        ValueError: if transformers has no such class.
    """
    transformers: Any = need("transformers", "transformers")
    accelerate: Any = need("accelerate", "transformers")
    from transformers.initialization import no_init_weights

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
    said = str(config.dtype or dtype or "float32").removeprefix("torch.")
    with (
        _told(path),
        accelerate.init_empty_weights(include_buffers=False),
        _default_dtype(config, said),
        no_init_weights(),
    ):
        model: Any = cls(config)
    model.initialize_weights()  # outside of the dtype: so does transformers with what it loads
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


@contextmanager
def _default_dtype(config: Any, name: str) -> Iterator[None]:
    """What transformers sets while it builds a model that it loads."""
    before, dtype = torch.get_default_dtype(), getattr(torch, name)
    inner = [getattr(config, key, None) for key in config.sub_configs]
    for each in (config, *inner):
        if each is not None:
            each.dtype = dtype
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def computed_tensor(model: Any, key: str) -> torch.Tensor | None:
    """A tensor that files need not have, as the class computes it (positions by sines, say).

    Args:
        model: of :func:`skeleton_of_config`.
        key: of a tensor in its state dict.

    Returns:
        The tensor; None where the class draws it at random, or does not say that files may lack it.
    """
    if not any(re.search(pattern, key) for pattern in model._keys_to_ignore_on_load_missing or ()):
        return None
    path, _, name = key.rpartition(".")
    owner = model.get_submodule(path)
    old = owner._parameters.get(name, owner._buffers.get(name))
    if not old.is_meta:
        return old.detach()
    steps = path.split(".")
    above = [model.get_submodule(".".join(steps[:i])) for i in range(len(steps) + 1)]
    init = next(m._init_weights for m in reversed(above) if hasattr(m, "_init_weights"))
    made = [torch.full(old.shape, start, dtype=old.dtype) for start in (0, 1)]
    for seed, tensor in enumerate(made):
        twin: Any = copy.deepcopy(owner)
        group = twin._parameters if name in twin._parameters else twin._buffers
        group[name] = nn.Parameter(tensor, False) if name in twin._parameters else tensor
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            init(twin)
        made[seed] = group[name].detach()
    return made[0] if torch.equal(*made) else None


def skeleton_of_names(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> nn.Module:
    """A model whose state dict has those keys, on meta, for checkpoints without a class.

    A key ``*.weight`` of floats in two dimensions is taken for a linear layer ``[out, in]``; for an
    embedding if its name has ``embed`` in it or is ``wte``, ``wpe`` or ``shared``, and it has no
    bias. All else are parameters.

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
    if _TABLES.search(name.rpartition(".")[2]) and f"{name}.bias" not in shapes:
        return nn.Embedding(*shape, device="meta")
    return nn.Linear(shape[1], shape[0], bias=f"{name}.bias" in shapes, device="meta")
