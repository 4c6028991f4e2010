"""Float checkpoints as sources: which tensors become layers, and packing them as they are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantization.checkpoint.disk.json_files import CheckpointError, read_json
from quantization.checkpoint.disk.safetensors_files import TensorFolder
from quantization.checkpoint.disk.stored_tensor import key_of
from quantization.checkpoint.format import CONFIG
from quantization.checkpoint.plain_config import ENTRY
from quantization.checkpoint.source.companions import assets_of, inner_files
from quantization.checkpoint.source.conversion import (
    SourceTensor,
    by_names,
    by_transformers,
    parts_of_experts,
)
from quantization.checkpoint.source.skeleton import (
    first_float,
    is_of_transformers,
    skeleton_of_config,
    skeleton_of_names,
)
from quantization.checkpoint.stored_model import (
    StoredLayer,
    StoredModel,
    saved_tensors,
    stored_model,
)
from quantization.methods.registry import fit_matrix
from quantization.methods.statistics import Statistics
from quantization.models.decisions import Request
from quantization.models.plan import ModelPlan, carry_out, make_plan
from quantization.models.planned import some_rows, spread
from quantization.models.recipe import Recipe
from quantization.numerics.granularity import Granularity
from quantization.schemes.layer_weights import pack_as
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme
from quantization.swap.experts import unfuse_experts as unfuse
from quantization.swap.patterns import Pattern
from quantization.swap.report import ReplacementReport
from quantization.swap.walker import Site, walk

__all__ = ["FloatSource", "open_source"]

_BLOCK_BYTES = 16 << 20  # of a weight, read and packed at a time
_SOME = 5


@dataclass(frozen=True)
class FloatSource:
    """A float checkpoint that is to be quantized.

    Attributes:
        files: its safetensors files.
        stored: what it becomes; loading a layer reads its weight and packs it.
        report: of every layer, as :func:`quantization.quantize_model` gives it.
        dropped: keys that the model has no place for.
        left: what of its sub-folders is no part of the model, by name below the folder.
        plan: of every parameter, as :func:`quantization.plan` gives it, where it was asked for.
    """

    files: TensorFolder
    stored: StoredModel
    report: ReplacementReport
    dropped: tuple[str, ...]
    left: tuple[str, ...] = ()
    plan: ModelPlan | None = None


def open_source(
    folder: str | os.PathLike[str],
    recipe: Recipe,
    *,
    exclude: Pattern | Iterable[Pattern] = (),
    model: nn.Module | None = None,
    nonfinite: str = "raise",
    unfuse_experts: bool = False,
    statistics: Mapping[str, Statistics] | None = None,
    planned: bool = False,
) -> FloatSource:
    """Plan the quantization of a checkpoint from its headers alone.

    Args:
        folder: safetensors files, single or sharded, or one such file.
        recipe: as for :func:`quantization.quantize_model`.
        exclude: as for :func:`quantization.quantize_model`.
        model: a model of those keys, on meta; it is changed. None: of the class that the folder's
            ``config.json`` names, its tensors made of those of the files as transformers does;
            without such a file layers are told by the names and shapes of tensors, as
            :func:`quantization.checkpoint.source.skeleton.skeleton_of_names` says.
        nonfinite: as for :func:`quantization.quantize_model`.
        unfuse_experts: as for :func:`quantization.quantize_checkpoint`.
        statistics: as for :func:`quantization.quantize_model`.
        planned: read some rows of each weight too, and say what is to be expected.

    Raises:
        FileNotFoundError, CheckpointError: if files are missing, broken, lack a tensor, or are
            quantized already.
        Whatever :func:`quantization.quantize_model` raises.
    """
    files = TensorFolder(folder)
    config = files.path / CONFIG
    plain = read_json(config) if files.path.is_dir() and config.is_file() else None
    if model is not None:
        sources = by_names(files)
    else:
        model, sources = _model_of(files, plain)
    used = {key for tensor in sources.values() for key in tensor.keys}
    if unfuse_experts:
        model = unfuse(model).model
        sources |= parts_of_experts(sources, model.named_modules())
    found = _adopt_forms(files, list(walk(model)), sources)
    used &= {key for tensor in found.values() for key in tensor.keys}
    options: dict[str, Any] = {"nonfinite": nonfinite, "statistics": statistics}
    request = Request(recipe, exclude, split_attention=False, **options)  # files have it whole
    plan = make_plan(model, request, partial(_some_rows, found)) if planned else None
    report = carry_out(model, request)
    template = stored_model(report.model)
    ways = {
        name: partial(_fitted, c.method, statistics, (c.name, *c.aliases))
        for c in report.replaced
        if c.method != "rtn"
        for name in (c.name, *c.aliases)
    }
    layers = {
        name: replace(layer, load=partial(_packed, found, name, layer, nonfinite, ways.get(name)))
        for name, layer in template.layers.items()
    }
    tensors = {key: found[key] for key in template.tensors}
    is_folder = files.path.is_dir()
    inner, left = inner_files(files.path) if is_folder else ({}, ())
    assets = assets_of(files) if is_folder else ()
    stored = StoredModel(layers, tensors, template.ties, plain, assets, inner)
    dropped = tuple(key for key in files.file_of if key not in used)
    return FloatSource(files, stored, report, dropped, left, plan)


def _model_of(
    files: TensorFolder, config: Mapping[str, Any] | None
) -> tuple[nn.Module, dict[str, SourceTensor]]:
    """The model of the class that the config names, or of the names of its tensors; and these."""
    if config is not None:
        _refuse_quantized(files.path, config)
    if config is not None and is_of_transformers(config):
        dtypes = (files.entry(key).dtype for key in files.file_of)
        model = skeleton_of_config(files.path, first_float(dtypes))
        return model, by_transformers(files, model)
    forms = {key: (files.entry(key).dtype, files.entry(key).shape) for key in files.file_of}
    return skeleton_of_names(forms), by_names(files)


def _refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Codes are no weights. An entry of no layers is that of a float model that was saved."""
    entry = config.get(ENTRY)
    if entry and not (isinstance(entry, dict) and entry.get("layers") == {}):
        raise CheckpointError(f"{folder} is quantized already: {CONFIG} has a {ENTRY}")


def _adopt_forms(
    files: TensorFolder, sites: list[Site], sources: Mapping[str, SourceTensor]
) -> dict[str, SourceTensor]:
    """Give the model's tensors, all on meta, the dtypes of the files; what each is read from."""
    places: list[tuple[str, nn.Module, str, torch.Tensor]] = []
    for site in sites:
        for name, tensor in saved_tensors(site):
            places.append((key_of(site.name, name), site.module, name, tensor))
    first = {id(tensor): key for key, *_, tensor in reversed(places) if key in sources}
    missing = [key for key, *_, tensor in places if id(tensor) not in first]
    if missing:
        raise CheckpointError(
            f"{files.path} lacks {len(missing)} tensors of the model: "
            f"{', '.join(missing[:_SOME])}. Its config.json may name another class than the files "
            "are of; or give a model of the checkpoint's own keys"
        )
    made: dict[int, torch.Tensor] = {}
    for key, module, name, tensor in places:
        source = sources[first[id(tensor)]]
        if source.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{files.path}: {key} has shape {source.shape}; the model's is "
                f"{tuple(tensor.shape)}"
            )
        if id(tensor) not in made:
            fresh = torch.empty(source.shape, dtype=getattr(torch, source.dtype), device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(fresh, False) if is_parameter else fresh
        group = module._parameters if name in module._parameters else module._buffers
        group[name] = made[id(tensor)]
    return {key: sources[first[id(tensor)]] for key, *_, tensor in places}


def _some_rows(
    sources: Mapping[str, SourceTensor], key: str, count: int, is_turned: bool
) -> torch.Tensor:
    """Rows of a weight, evenly spread, where files let them be read alone."""
    source = sources[key]
    if is_turned or source.rows is None or source.shape[0] <= count:
        weight = source.load()
        return some_rows(weight.t() if is_turned else weight, count)
    return torch.cat([source.rows(i, i + 1) for i in spread(source.shape[0], count)])


# ---- packing ---------------------------------------------------------------------------------


def _packed(
    sources: Mapping[str, SourceTensor],
    name: str,
    layer: StoredLayer,
    nonfinite: str,
    pack: Callable[..., PackedWeights] | None,
) -> PackedWeights:
    """Read a weight and pack it, block by block of its rows where rows stand for themselves."""
    key = key_of(name, "weight")
    source, options = sources[key], {"nonfinite": nonfinite, "name": key}
    way: dict[str, Any] = {"pack": pack} if pack else {}
    rows, cols = layer.shape
    dtype = getattr(torch, layer.dtype)
    block = max(1, _BLOCK_BYTES // max(1, cols * dtype.itemsize))
    is_turned = "was_conv1d" in layer.more
    if (
        pack
        or source.rows is None
        or is_turned
        or not _rows_are_apart(layer.scheme)
        or rows <= block
    ):
        weight = source.load()
        return pack_as(weight.t() if is_turned else weight, layer.scheme, dtype, **way, **options)
    parts: dict[str, torch.Tensor] = {
        part: torch.empty(form.shape, dtype=getattr(torch, form.dtype))
        for part, form in layer.scheme.buffers(layer.shape, dtype).items()
    }
    for start in range(0, rows, block):
        stop = min(rows, start + block)
        try:
            packed = pack_as(source.rows(start, stop), layer.scheme, dtype, **options)
        except ValueError as error:
            if start:
                error.add_note(f"rows are counted from row {start} of {key}")
            raise
        for part, tensor in parts.items():
            made = getattr(packed, part)
            tensor[slice(None) if len(made) == len(tensor) else slice(start, stop)] = made
    return PackedWeights(layer.scheme, layer.shape, **parts, dtype=dtype)


def _fitted(
    method: Any,
    known: Mapping[str, Statistics] | None,
    names: tuple[str, ...],
    weight: torch.Tensor,
    scheme: Scheme,
    **options: Any,
) -> PackedWeights:
    """A weight packed by a method, with what is known of its layer's inputs under any name."""
    name = next((name for name in names if known is not None and name in known), None)
    statistics = known[name] if known is not None and name is not None else None
    return fit_matrix(weight, scheme, method, statistics, **options)


def _rows_are_apart(scheme: Scheme) -> bool:
    """Whether the codes of a row depend on no other row."""
    return scheme.granularity != Granularity.PerTensor
