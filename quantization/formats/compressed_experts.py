"""Experts as their family has them on disk: the gate apart from the rest, and under its own names.

A model with unfused experts (:func:`quantization.unfuse_experts`) has a layer ``gate_up_proj`` for
each of them; checkpoints, and what serves them, have ``w1`` and ``w3``, or ``gate_proj`` and
``up_proj``. Which, and where in the model, says the table by which transformers loads the family.

Source: transformers, ``transformers/conversion_mapping.py``, and ``revert_weight_conversion`` of
``transformers/core_model_loading.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from quantization.checkpoint.disk.stored_tensor import StoredTensor, key_of
from quantization.checkpoint.stored_model import StoredLayer, StoredModel
from quantization.formats.errors import FormatError
from quantization.ops.extras import need
from quantization.schemes.packed_weights import PackedWeights

__all__ = ["EXPERTS", "is_of_expert", "with_family_names"]

#: A pattern of the layers of numbered experts.
EXPERTS = r"(?P<experts>(?:.*\.)?experts)\.(?P<number>\d+)\.(?P<part>\w+)"
_OF_EXPERT = re.compile(EXPERTS)
_OURS = ("gate_up_proj", "up_proj", "down_proj")  # parts of an unfused expert
_WEIGHT = ".weight"


def is_of_expert(name: str) -> bool:
    """Whether a layer is one of a numbered expert.

    Example:
        >>> is_of_expert("model.layers.0.block_sparse_moe.experts.11.w1")
        True
    """
    return _OF_EXPERT.fullmatch(name) is not None


def with_family_names(stored: StoredModel) -> StoredModel:
    """The same model, with unfused experts as their family has them; others stay as they are.

    Args:
        stored: a model; its ``config`` names the family.

    Raises:
        FormatError: if the family is not known to have its experts one by one.
        ImportError: if there are unfused experts, and transformers is not installed.
    """
    fused = _unfused_in(stored)
    if not fused:
        return stored
    family = _Family.of(stored.config or {}, fused)
    layers = dict(
        part for name, layer in stored.layers.items() for part in family.layers(name, layer)
    )
    tensors = dict(
        part for key, tensor in stored.tensors.items() for part in family.tensors(key, tensor)
    )
    ties = {family.rename(key): family.rename(first) for key, first in stored.ties.items()}
    return replace(stored, layers=layers, tensors=tensors, ties=ties)


def _unfused_in(stored: StoredModel) -> set[str]:
    """Modules of experts that were unfused; where they never were fused, there is a gate_proj."""
    names = {*stored.layers, *(key.rpartition(".")[0] for key in stored.tensors)}
    found = [match for name in names if (match := _OF_EXPERT.fullmatch(name))]
    apart = {match["experts"] for match in found if match["part"] == "gate_proj"}
    return {match["experts"] for match in found if match["part"] in _OURS} - apart


@dataclass(frozen=True)
class _Family:
    """How a family names its tensors on disk.

    Attributes:
        experts: modules of experts.
        names: of the parts of an expert: those of ``gate_up_proj`` are two, one after the other in
            its rows.
        renamings: transformers' rules from the names of the model to those of files.
    """

    experts: set[str]
    names: Mapping[str, tuple[str, ...]]
    renamings: tuple[Any, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], experts: set[str]) -> _Family:
        """The family of a config.

        Raises:
            FormatError: if it is none that has its experts one by one.
        """
        mapping: Any = need("transformers.conversion_mapping", "transformers")
        places = [place for place in (config, config.get("text_config")) if place]
        kinds = [str(place["model_type"]) for place in places if "model_type" in place]
        rules = [r for k in kinds for r in mapping.get_checkpoint_conversion_mapping(k) or ()]
        names = dict(found for rule in rules if (found := _names_by(rule)) is not None)
        if "down_proj" not in names or not names.keys() & {"gate_up_proj", "up_proj"}:
            known = f"their family, {kinds[0]}, keeps them fused" if kinds else "no config names it"
            raise FormatError(
                f"{min(experts)} has experts one by one, and no reader would know them: {known}. "
                "Leave them fused and in float, or stay with what save_quantized writes"
            )
        kept = [r for r in rules if type(r).__name__ in ("WeightRenaming", "GroupWeightRename")]
        return cls(experts, names, tuple(rule.reverse_transform() for rule in reversed(kept)))

    def rename(self, key: str) -> str:
        """A key of the model as it is on disk, but for the parts of experts."""
        for rule in self.renamings:
            key, _ = rule.rename_source_key(key)
        return key

    def _parts(self, name: str) -> tuple[str, ...]:
        """The names on disk of a layer: two of a gate with what it gates, else one."""
        match = _OF_EXPERT.fullmatch(name)
        if match is None or match["experts"] not in self.experts:
            return (self.rename(name + _WEIGHT).removesuffix(_WEIGHT),)
        if match["part"] not in self.names:
            raise FormatError(f"{name} is none of the parts that an expert of its family has")
        return tuple(
            self.rename(f"{match['experts']}.{match['number']}.{part}{_WEIGHT}").removesuffix(
                _WEIGHT
            )
            for part in self.names[match["part"]]
        )

    def layers(self, name: str, layer: StoredLayer) -> Iterator[tuple[str, StoredLayer]]:
        """The layers on disk of a layer."""
        names = self._parts(name)
        rows, cols = layer.shape
        for new, start, stop in _shares(names, rows):
            load = layer.load if len(names) == 1 else partial(_some_rows, layer, start, stop)
            yield new, replace(layer, shape=(stop - start, cols), load=load)

    def tensors(self, key: str, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
        """The tensors on disk of a tensor."""
        name, _, part = key.rpartition(".")
        names = self._parts(name) if _OF_EXPERT.fullmatch(name) else ()
        if len(names) < 2:
            yield (key_of(names[0], part) if names else self.rename(key)), tensor
            return
        for new, start, stop in _shares(names, tensor.shape[0]):
            shape = (stop - start, *tensor.shape[1:])
            load = partial(_some_rows_of, tensor, start, stop)
            yield key_of(new, part), StoredTensor(shape, tensor.dtype, load)


def _names_by(rule: Any) -> tuple[str, tuple[str, ...]] | None:
    """What part of an expert a rule of transformers makes, and out of which; None if of none.

    Only rules that stack experts, and lay two parts of each one after the other.
    """
    made = [str(target).rpartition("experts.")[2] for target in rule.target_patterns]
    kinds = [type(operation).__name__ for operation in getattr(rule, "operations", ())]
    joins = {1: ["MergeModulelist"], 2: ["MergeModulelist", "Concatenate"]}
    parts = [re.fullmatch(r".*experts\.\*\.(\w+)\.weight", str(s)) for s in rule.source_patterns]
    if len(made) != 1 or made[0] not in _OURS or kinds != joins.get(len(parts)):
        return None
    if not all(parts) or (len(parts) == 2 and rule.operations[1].dim != 1):
        return None
    return made[0], tuple(match[1] for match in parts if match)


def _shares(names: tuple[str, ...], rows: int) -> Iterator[tuple[str, int, int]]:
    each = rows // len(names)
    return ((name, i * each, (i + 1) * each) for i, name in enumerate(names))


def _some_rows(layer: StoredLayer, start: int, stop: int) -> PackedWeights:
    return layer.load().rows(start, stop)


def _some_rows_of(tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    return tensor.load()[start:stop]
