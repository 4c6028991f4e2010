"""Which tensors of files a model is made of: by its own names, or by transformers' mapping.

transformers names many tensors otherwise in files than in memory, and joins, cuts or turns some
(the experts of a mixture are one tensor in memory, and one each in files). Its rules are followed
here without reading anything; what a rule makes is computed when it is asked for, and where a rule
works on each expert for itself, for these experts only.

Source: ``convert_and_load_state_dict_in_model`` of transformers' ``core_model_loading.py``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from quantization.checkpoint.disk.json_files import CheckpointError
from quantization.checkpoint.disk.safetensors_files import TensorFolder
from quantization.checkpoint.disk.stored_tensor import StoredTensor, key_of
from quantization.checkpoint.source.skeleton import computed_tensor
from quantization.ops.dtypes import name_of
from quantization.ops.extras import need
from quantization.swap.experts import UnfusedExperts

__all__ = ["SourceTensor", "by_names", "by_transformers", "parts_of_experts"]

#: Rules that leave the first dimension of a tensor alone, if their dimensions are others.
_WITHIN = ("Chunk", "Concatenate", "Interleave", "Split", "Transpose")


@dataclass(frozen=True)
class SourceTensor(StoredTensor):
    """A tensor of a model, made of files.

    Attributes:
        keys: of the tensors in files that it is made of.
    """

    keys: tuple[str, ...] = ()

    @classmethod
    def stored(cls, files: TensorFolder, key: str) -> SourceTensor:
        """A tensor of a file as it is."""
        tensor = files.file_of[key].to_read(key)
        return cls(tensor.shape, tensor.dtype, tensor.load, tensor.rows, (key,))

    def cast(self, dtype: torch.dtype) -> SourceTensor:
        """The same in another dtype."""
        if name_of(dtype) == self.dtype:
            return self
        rows = None if self.rows is None else partial(_cast, self.rows, dtype)
        return replace(self, dtype=name_of(dtype), load=partial(_cast, self.load, dtype), rows=rows)


def _cast(read: Callable[..., torch.Tensor], dtype: torch.dtype, *arguments: int) -> torch.Tensor:
    return read(*arguments).to(dtype)


def by_names(files: TensorFolder) -> dict[str, SourceTensor]:
    """The tensors of files for a model that has the same names."""
    return {key: SourceTensor.stored(files, key) for key in files.file_of}


def by_transformers(files: TensorFolder, model: Any) -> dict[str, SourceTensor]:
    """The tensors of files by their keys in the state dict of a model of transformers.

    Args:
        files: of any names that transformers loads into that class.
        model: on meta. Those of its tensors that it ties, and which differ in the files, are tied
            no more.

    Raises:
        ImportError: if transformers is missing, or too old for that.
        CheckpointError: if a rule of transformers cannot be followed, as tensors are missing, say.
    """
    need("transformers", "transformers", "5.22")
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
    rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    own, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, SourceTensor] = {}
    made: dict[str, _Made] = {}
    for key in sorted(files.file_of, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, pattern = loading.rename_source_key(key, [], [], prefix, own)
        if name not in own or name in found:
            continue
        if pattern is None:
            found[name] = SourceTensor.stored(files, key)
        else:
            new = made.setdefault(name, _Made(name, rule_of[pattern], files, own, model.config))
            new.keys.setdefault(pattern, []).append(key)
    for new in made.values():
        found = new.tensors() | found
    for name in own.keys() - found.keys():
        tensor = computed_tensor(model, name)
        if tensor is not None:
            load = partial(_itself, tensor)
            found[name] = SourceTensor(tuple(tensor.shape), name_of(tensor.dtype), load)
    return _tied(_as_loaded(found, own, model), model)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _as_loaded(
    found: Mapping[str, SourceTensor], own: Mapping[str, torch.Tensor], model: Any
) -> dict[str, SourceTensor]:
    """The tensors in the dtypes that transformers gives them, whatever those of the files are."""
    plan = model._get_dtype_plan(model.config.dtype)
    kept = [(pattern.replace("*", ".*"), dtype) for pattern, dtype in plan.items()]
    made = {}
    for name, tensor in found.items():
        planned = next((dtype for pattern, dtype in kept if re.search(pattern, name)), None)
        made[name] = tensor.cast(planned or own[name].dtype)
    return made


# ---- what a rule makes -----------------------------------------------------------------------


@dataclass
class _Made:
    """What a rule of transformers makes of tensors in files.

    Attributes:
        name: of the first tensor that it makes.
        rule: a ``WeightConverter``.
        files: where the tensors are.
        own: the state dict of the model, on meta.
        config: of the model.
        keys: of tensors in the files by the pattern of the rule that they match, in order.
    """

    name: str
    rule: Any
    files: TensorFolder
    own: Mapping[str, torch.Tensor]
    config: Any
    keys: dict[str, list[str]] = field(default_factory=dict)

    def tensors(self) -> dict[str, SourceTensor]:
        """By name; their forms are found by following the rule on meta."""
        try:
            forms = self._convert(self._outline)
        except Exception as error:  # whatever a rule raises for what it was not written for
            keys = [key for group in self.keys.values() for key in group]
            raise CheckpointError(
                f"{self.files.path}: transformers makes {self.name} of {len(keys)} tensors such as "
                f"{keys[0]}, and cannot of these: {error}"
            ) from error
        keys = tuple(key for group in self.keys.values() for key in group)
        made = {}
        for name, form in forms.items():
            shape, dtype = tuple(form.shape), name_of(form.dtype)
            if self._is_apart(form):
                rows = partial(self._rows, name)
                load = partial(_row_by_row, rows, shape, form.dtype)
                made[name] = SourceTensor(shape, dtype, load, rows, keys)
            else:
                made[name] = SourceTensor(shape, dtype, partial(self._whole, name), None, keys)
        return made

    def _whole(self, name: str) -> torch.Tensor:
        return self._convert(lambda key: self.files.file_of[key].to_read(key).load())[name]

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        def read(key: str) -> torch.Tensor:
            if self._merges():
                return self.files.file_of[key].to_read(key).load()
            return self.files.file_of[key].rows(key, start, stop)

        return self._convert(read, slice(start, stop))[name]

    def _convert(
        self, read: Callable[[str], torch.Tensor], rows: slice | None = None
    ) -> dict[str, torch.Tensor]:
        """Follow the rule; with ``rows``, for those of the first dimension only."""
        rule = copy.deepcopy(self.rule)
        some = rows if rows is not None and self._merges() else slice(None)
        for pattern, keys in self.keys.items():
            for key in keys[some]:
                rule.add_tensor(self.name, key, pattern, partial(read, key))
        with torch.no_grad():
            made = rule.convert(self.name, model=_Outlines(self.own, rows), config=self.config)
        return {n: value[0] if isinstance(value, list) else value for n, value in made.items()}

    def _outline(self, key: str) -> torch.Tensor:
        entry = self.files.entry(key)
        return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="meta")

    def _merges(self) -> bool:
        """Whether a tensor of its first dimension is one in the files."""
        first = self.rule.operations[0]
        return type(first).__name__ == "MergeModulelist" and first.dim == 0

    def _is_apart(self, form: torch.Tensor) -> bool:
        """Whether rows of the first dimension are made each for itself."""
        others = self.rule.operations[self._merges() :]
        if not all(type(op).__name__ in _WITHIN and min(_dims_of(op)) > 0 for op in others):
            return False
        if self._merges():
            lengths = {len(keys) for keys in self.keys.values()}
        else:
            lengths = {self.files.entry(k).shape[0] for keys in self.keys.values() for k in keys}
        return form.ndim > 0 and lengths == {form.shape[0]}


class _Outlines:
    """Stands for the model where a rule asks for the form of a Parameter."""

    def __init__(self, own: Mapping[str, torch.Tensor], rows: slice | None) -> None:
        self._own, self._rows = own, rows

    def get_parameter(self, name: str) -> torch.Tensor:
        """Itself, on meta, or its rows."""
        return self._own[name] if self._rows is None else self._own[name][self._rows]


def _dims_of(operation: Any) -> list[int]:
    return [value for name, value in vars(operation).items() if name in ("dim", "dim0", "dim1")]


def _row_by_row(
    rows: Callable[[int, int], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """The whole of a tensor; what it is made of is held for one row at a time."""
    made = torch.empty(shape, dtype=dtype)
    for index in range(shape[0]):
        made[index] = rows(index, index + 1)[0]
    return made


# ---- tied tensors ----------------------------------------------------------------------------


def _tied(found: dict[str, SourceTensor], model: Any) -> dict[str, SourceTensor]:
    """Part tied tensors of the model that differ in the files, as transformers does."""
    for target, source in list(getattr(model, "all_tied_weights_keys", {}).items()):
        if target not in found or source not in found:
            continue
        one, other = found[target], found[source]
        if _are_equal(one, other):
            both = (*one.keys, *other.keys)
            found[target], found[source] = replace(one, keys=both), replace(other, keys=both)
            continue
        owner, _, name = target.rpartition(".")
        group = model.get_submodule(owner)._parameters
        group[name] = torch.nn.Parameter(torch.empty_like(group[name]), group[name].requires_grad)
        del model.all_tied_weights_keys[target]
    return found


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if one.rows is None or other.rows is None or not one.shape:
        return torch.equal(one.load(), other.load())
    step = max(1, (1 << 20) // max(1, one.shape[-1]))
    ends = [(i, min(i + step, one.shape[0])) for i in range(0, one.shape[0], step)]
    return all(torch.equal(one.rows(*rows), other.rows(*rows)) for rows in ends)


# ---- experts ---------------------------------------------------------------------------------


def parts_of_experts(
    sources: Mapping[str, SourceTensor], modules: Iterable[tuple[str, torch.nn.Module]]
) -> dict[str, SourceTensor]:
    """The tensors of experts that were unfused, each of its part of the fused one.

    Args:
        sources: of the fused model.
        modules: names and modules of the unfused one.
    """
    made: dict[str, SourceTensor] = {}
    kept = _Kept()
    for path, module in modules:
        for name in module.projections if isinstance(module, UnfusedExperts) else ():
            for end, part in (("", "weight"), ("_bias", "bias")):
                fused = sources.get(key_of(path, f"{name}{end}"))
                for index in range(fused.shape[0] if fused else 0):
                    turned = part == "weight" and module.is_transposed
                    key = key_of(path, f"{index}.{name}.{part}")
                    made[key] = _part(fused, index, turned, kept)
    return made


def _part(fused: SourceTensor, index: int, turned: bool, kept: _Kept) -> SourceTensor:
    shape = fused.shape[1:][::-1] if turned else fused.shape[1:]

    def load() -> torch.Tensor:
        rows = partial(kept.rows, fused) if fused.rows is None else fused.rows
        part = rows(index, index + 1)[0]
        return part.t() if turned else part

    return SourceTensor(shape, fused.dtype, load, None, fused.keys)


class _Kept:
    """The last tensors that can be made as a whole only: the two projections of some experts."""

    def __init__(self) -> None:
        self._tensors: dict[int, torch.Tensor] = {}

    def rows(self, tensor: SourceTensor, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor that is made when it is not there."""
        if id(tensor) not in self._tensors:
            while len(self._tensors) > 1:
                del self._tensors[next(iter(self._tensors))]
            self._tensors[id(tensor)] = tensor.load()
        return self._tensors[id(tensor)][start:stop]
