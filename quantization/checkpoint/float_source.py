"""Float checkpoints as sources: which tensors become layers, and packing them as they are read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from quantization.checkpoint.disk.json_files import CheckpointError, parse_any, read_json, read_text
from quantization.checkpoint.disk.safetensors_files import INDEX, TensorFolder
from quantization.checkpoint.disk.stored_tensor import key_of
from quantization.checkpoint.format import CONFIG, FILE
from quantization.checkpoint.plain_config import ENTRY
from quantization.checkpoint.skeleton import skeleton_of_config, skeleton_of_names
from quantization.checkpoint.stored_model import (
    StoredLayer,
    StoredModel,
    saved_tensors,
    stored_model,
)
from quantization.models.quantizer import quantize_model
from quantization.models.recipe import Recipe
from quantization.numerics.granularity import Granularity
from quantization.schemes.layer_weights import pack_as
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme
from quantization.swap.patterns import Pattern
from quantization.swap.report import ReplacementReport
from quantization.swap.walker import Site, walk

__all__ = ["FloatSource", "assets_of", "inner_files", "open_source"]

_BLOCK_BYTES = 16 << 20  # of a weight, read and packed at a time
_SOME = 5
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
_MODULES = "modules.json"  # of sentence-transformers: [{"path": a sub-folder}]


@dataclass(frozen=True)
class FloatSource:
    """A float checkpoint that is to be quantized.

    Attributes:
        files: its safetensors files.
        stored: what it becomes; loading a layer reads its weight and packs it.
        report: of every layer, as :func:`quantization.quantize_model` gives it.
        dropped: keys that the model has no place for.
        left: what of its sub-folders is no part of the model, by name below the folder.
    """

    files: TensorFolder
    stored: StoredModel
    report: ReplacementReport
    dropped: tuple[str, ...]
    left: tuple[str, ...] = ()


def open_source(
    folder: str | os.PathLike[str],
    recipe: Recipe,
    *,
    exclude: Pattern | Iterable[Pattern] = (),
    model: nn.Module | None = None,
    nonfinite: str = "raise",
) -> FloatSource:
    """Plan the quantization of a checkpoint from its headers alone.

    Args:
        folder: safetensors files, single or sharded, or one such file.
        recipe: as for :func:`quantization.quantize_model`.
        exclude: as for :func:`quantization.quantize_model`.
        model: a model of those keys, on meta; it is changed. None: of the class that the folder's
            ``config.json`` names; without that file layers are told by the names and shapes of
            tensors, as :func:`quantization.checkpoint.skeleton.skeleton_of_names` says.
        nonfinite: as for :func:`quantization.quantize_model`.

    Raises:
        FileNotFoundError, CheckpointError: if files are missing, broken, lack a tensor, or are
            quantized already.
        Whatever :func:`quantization.quantize_model` raises.
    """
    files = TensorFolder(folder)
    config = files.path / CONFIG
    has_config = files.path.is_dir() and config.is_file()
    if model is None:
        if has_config:
            _refuse_quantized(config)
        forms = {key: (files.entry(key).dtype, files.entry(key).shape) for key in files.file_of}
        model = skeleton_of_config(files.path) if has_config else skeleton_of_names(forms)
    sites = list(walk(model))
    found = _adopt_stored_dtypes(files, sites)
    report = quantize_model(model, recipe, exclude=exclude, nonfinite=nonfinite)
    template = stored_model(report.model)
    layers = {
        name: replace(layer, load=partial(_packed, files, name, layer, nonfinite, found))
        for name, layer in template.layers.items()
    }
    tensors = {key: files.file_of[found[key]].to_read(found[key]) for key in template.tensors}
    used = set(found.values())
    dropped = tuple(key for key in files.file_of if key not in used)
    is_folder = files.path.is_dir()
    inner, left = inner_files(files.path) if is_folder else ({}, ())
    stored = StoredModel(
        layers,
        tensors,
        template.ties,
        read_json(config) if has_config else None,
        assets_of(files) if is_folder else (),
        inner,
    )
    return FloatSource(files, stored, report, dropped, left)


def _refuse_quantized(config: Path) -> None:
    """Codes are no weights. An entry of no layers is that of a float model that was saved."""
    entry = read_json(config).get(ENTRY)
    if entry and not (isinstance(entry, dict) and entry.get("layers") == {}):
        raise CheckpointError(f"{config.parent} is quantized already: {CONFIG} has a {ENTRY}")


def _adopt_stored_dtypes(files: TensorFolder, sites: list[Site]) -> dict[str, str]:
    """Give the model's tensors, all on meta, the dtypes of the files; keys -> keys of the files."""
    places: list[tuple[str, nn.Module, str, torch.Tensor]] = []
    for site in sites:
        for name, tensor in saved_tensors(site):
            places.append((key_of(site.name, name), site.module, name, tensor))
    first = {id(tensor): key for key, *_, tensor in reversed(places) if key in files.file_of}
    missing = [key for key, *_, tensor in places if id(tensor) not in first]
    if missing:
        raise CheckpointError(
            f"{files.path} lacks {len(missing)} tensors of the model: "
            f"{', '.join(missing[:_SOME])}. "
            "If transformers renames or joins tensors while it loads this model, load it by "
            "from_pretrained, quantize and save it; or give a model of the checkpoint's own keys"
        )
    made: dict[int, torch.Tensor] = {}
    for key, module, name, tensor in places:
        entry = files.entry(first[id(tensor)])
        if entry.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{files.path}: {key} has shape {entry.shape}; the model's is {tuple(tensor.shape)}"
            )
        if id(tensor) not in made:
            fresh = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(fresh, False) if is_parameter else fresh
        group = module._parameters if name in module._parameters else module._buffers
        group[name] = made[id(tensor)]
    return {key: first[id(tensor)] for key, *_, tensor in places}


def assets_of(files: TensorFolder) -> tuple[Path, ...]:
    """Small files beside the tensors that belong to the model."""
    own = {*files.files, INDEX, CONFIG}
    return tuple(
        path
        for path in sorted(files.path.iterdir())
        if path.is_file() and path.name not in own and not path.name.endswith(_WEIGHTS)
        and not path.name.endswith(".index.json")
    )  # fmt: skip


def inner_files(folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The files of a folder's sub-folders that belong to the model, by name; and what is left.

    A sub-folder that holds weights is a model of its own (a checkpoint of a training, an export)
    and is left, but where ``modules.json`` of sentence-transformers names it: its weights belong to
    the model then and stay as they are. What was quantized already is left, and so are links to
    folders and links that lead out of the folder; but into the blobs beside the snapshots of a
    model hub's cache links are followed. Folders whose names begin with a dot are passed over.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     for name in ("1_Pooling/config.json", "onnx/model.onnx"):
        ...         Path(place, name).parent.mkdir()
        ...         Path(place, name).touch()
        ...     kept, left = inner_files(Path(place))
        >>> list(kept), left
        (['1_Pooling/config.json'], ('onnx/',))
    """
    modules, kept, left = _modules_of(folder), {}, []
    for place, folders, names in os.walk(folder, onerror=_raise):
        here = Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in [here / name for name in folders]:
            if not _belongs(path, folder, modules):
                folders.remove(path.name)
                left.append(f"{path.relative_to(folder).as_posix()}/")
        for path in sorted(here / name for name in names if here != folder):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and _is_inside(path, folder):
                kept[name] = path
            else:
                left.append(name)
    return kept, tuple(left)


def _modules_of(folder: Path) -> set[Path]:
    """The sub-folders that a ``modules.json`` names."""
    try:
        plain = parse_any(read_text(folder / _MODULES), _MODULES)
    except (OSError, CheckpointError):
        return set()
    entries = plain if isinstance(plain, list) else []
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return {folder / path for path in paths if isinstance(path, str)} - {folder}


def _belongs(path: Path, folder: Path, modules: set[Path]) -> bool:
    """Whether a sub-folder is part of the model."""
    if path.is_symlink() or (path / FILE).is_file():
        return False
    has_weights = any(file.name.endswith(_WEIGHTS) for file in path.iterdir())
    return not has_weights or not modules.isdisjoint((path, *path.parents))


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file lies where it seems to, or is a link within the folder or to hub blobs."""
    real, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return not path.is_symlink() or real.is_relative_to(home) or real.is_relative_to(blobs)


def _raise(error: OSError) -> None:
    raise error


# ---- packing ---------------------------------------------------------------------------------


def _packed(
    files: TensorFolder, name: str, layer: StoredLayer, nonfinite: str, found: dict[str, str]
) -> PackedWeights:
    """Read a weight and pack it, block by block of its rows where rows stand for themselves."""
    key = found[key_of(name, "weight")]
    file, options = files.file_of[key], {"nonfinite": nonfinite, "name": key}
    rows, cols = layer.shape
    dtype = getattr(torch, layer.dtype)
    block = max(1, _BLOCK_BYTES // max(1, cols * dtype.itemsize))
    if "was_conv1d" in layer.more or not _rows_are_apart(layer.scheme) or rows <= block:
        weight = file.rows(key, 0, files.entry(key).shape[0])
        weight = weight.t() if "was_conv1d" in layer.more else weight
        return pack_as(weight, layer.scheme, dtype, **options)
    parts: dict[str, torch.Tensor] = {
        part: torch.empty(form.shape, dtype=getattr(torch, form.dtype))
        for part, form in layer.scheme.buffers(layer.shape, dtype).items()
    }
    for start in range(0, rows, block):
        stop = min(rows, start + block)
        try:
            packed = pack_as(file.rows(key, start, stop), layer.scheme, dtype, **options)
        except ValueError as error:
            if start:
                error.add_note(f"rows are counted from row {start} of {key}")
            raise
        for part, tensor in parts.items():
            made = getattr(packed, part)
            tensor[slice(None) if len(made) == len(tensor) else slice(start, stop)] = made
    return PackedWeights(layer.scheme, layer.shape, **parts, dtype=dtype)


def _rows_are_apart(scheme: Scheme) -> bool:
    """Whether the codes of a row depend on no other row."""
    return scheme.granularity != Granularity.PerTensor
