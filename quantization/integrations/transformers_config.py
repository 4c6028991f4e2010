"""The config of the transformers quantizer: a recipe to follow, and the table of what was made.

Its form in ``config.json``: :mod:`quantization.checkpoint.plain_config`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantization.calibration.files import load_statistics
from quantization.checkpoint.plain_config import (
    METHOD,
    OPTIONS,
    VERSION,
    check_plain,
    scheme_of_form,
    table_of,
)
from quantization.layers.quantized_module import QuantizedModule
from quantization.methods.statistics import Statistics
from quantization.models.quantizer import form_of, quantize_model
from quantization.models.recipe import W8A16, Recipe, read_recipe
from quantization.schemes.scheme import Scheme
from quantization.swap.conversion import memory_of
from quantization.swap.experts import UnfusedExperts
from quantization.swap.report import ReplacementReport

__all__ = ["METHOD", "QuantizationConfig"]

DEFAULT_EXCLUDE = ("lm_head",)


class QuantizationConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` is to quantize a model: the arguments of ``quantize_model``, as JSON.

    ``from_pretrained(path, quantization_config=QuantizationConfig("w4g64a"))`` makes, weight by
    weight as they are read, the layers that :func:`quantization.quantize_model` makes of the float
    model, bit for bit. What is saved after that loads without arguments.

    Args:
        recipe: as :func:`quantization.quantize_model` takes it, with patterns that are texts: a
            Scheme or its short name, or ordered rules ``{pattern: scheme or None}``; ``"w8a16"`` in
            the place of a scheme for the int8 layer.
        exclude: patterns of what stays in float; the default, the output layer ``lm_head``, is
            skipped where a model has none. A list that is given replaces it: ``()`` excludes
            nothing.
        untie: quantize also a layer whose weight a tensor shares that stays in float.
        strict: raise if a layer would be left that is not excluded.
        nonfinite: ``"raise"``, or ``"mark"``: a group with a NaN or infinity becomes NaN.
        unfuse_experts: give each expert of fused ones linear layers, so that they are quantized
            too, as :func:`quantization.unfuse_experts` does.
        statistics: of the inputs of the model's layers, for methods that use them, as
            :func:`quantization.quantize_model` takes them; or the file of
            :func:`quantization.save_statistics`. They are not saved with the model.

    Attributes:
        layers: of a quantized model, the scheme of each layer by its dotted name; else None.
        ties: tensors of layers that are also another tensor, by keys of a state dict: key -> that.

    Raises:
        TypeError: for a pattern that cannot be saved (a type, a predicate), or no pattern at all.
        ValueError: for rules that are none.

    Example:
        >>> QuantizationConfig({"re:mlp": "w4g64a", "*": "w8a16"}).to_dict()["recipe"]
        [{'pattern': 're:mlp', 'scheme': 'w4g64a'}, {'pattern': '*', 'scheme': 'w8a16'}]
        >>> QuantizationConfig("w4").exclude
        ['lm_head']
    """

    def __init__(
        self,
        recipe: Recipe,
        exclude: str | Iterable[str] = DEFAULT_EXCLUDE,
        *,
        untie: bool = False,
        strict: bool = False,
        nonfinite: str = "raise",
        unfuse_experts: bool = False,
        statistics: Mapping[str, Statistics] | str | os.PathLike[str] | None = None,
    ) -> None:
        if nonfinite not in ("raise", "mark"):
            raise ValueError(f"nonfinite must be 'raise' or 'mark', not {nonfinite!r}")
        self.quant_method = METHOD
        self.recipe = _plain_recipe(recipe)
        if not isinstance(exclude, Iterable):
            raise TypeError(f"exclude is {exclude!r:.60}; give patterns, or () for none")
        self.exclude = [exclude] if isinstance(exclude, str) else [*exclude]
        for pattern in self.exclude:
            _check_pattern(pattern)
        self.untie = untie
        self.strict = strict
        self.nonfinite = nonfinite
        self.unfuse_experts = unfuse_experts
        is_file = isinstance(statistics, str | os.PathLike)
        self.statistics = load_statistics(statistics) if is_file else statistics
        self.layers: dict[str, str] | None = None
        self.ties: dict[str, str] = {}

    # ---- to and from JSON --------------------------------------------------------------------

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """The config of what :meth:`to_dict` wrote, or of arguments given as a dict.

        Raises:
            ValueError: for a later format version, an unknown or missing key, or a layer whose
                scheme is none; the message names it.

        Example:
            >>> config = QuantizationConfig("w4g64a", ())
            >>> QuantizationConfig.from_dict(config.to_dict()) == config
            True
        """
        plain = {**config_dict}
        check_plain(plain)
        layers, recipe = plain.get("layers"), plain.get("recipe")
        if recipe is None and layers is None:
            raise ValueError("quantization_config has neither a 'recipe' nor 'layers'")
        options = {key: plain[key] for key in OPTIONS if key in plain}
        config = cls("w8" if recipe is None else _recipe_from(recipe), **options)
        if recipe is None:
            config.recipe = None
        if layers is not None:
            config.layers, config.ties = {**layers}, {**plain.get("ties", {})}
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the table of layers if there is one.

        Example:
            >>> QuantizationConfig("w4").to_dict()["format_version"]
            1
        """
        plain = {"quant_method": METHOD, "format_version": VERSION, "recipe": self.recipe}
        plain |= {key: getattr(self, key) for key in OPTIONS}
        if self.layers is not None:
            plain |= table_of(self.layers, self.ties)
        return plain

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantizationConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    # ---- models ------------------------------------------------------------------------------

    def quantize(self, model: nn.Module, besides: Collection[str] = ()) -> ReplacementReport:
        """:func:`quantization.quantize_model` with the arguments that this holds.

        Args:
            model: what it changes.
            besides: dotted names of what is to stay in float besides what is excluded.

        Example:
            >>> model = nn.Sequential(nn.Linear(64, 64))
            >>> QuantizationConfig("w4g64a").quantize(model)["0"].scheme
            'w4g64a'
        """
        exclude = self.exclude
        if tuple(exclude) == DEFAULT_EXCLUDE:
            keys = {name.rpartition(".")[2] for name, _ in model.named_modules()}
            exclude = [name for name in exclude if name in keys]
        recipe = rules_of(self.layers) if self.recipe is None else _recipe_from(self.recipe)
        return quantize_model(
            model,
            recipe,
            exclude=[*exclude, *([lambda name, module: name in besides] if besides else [])],
            untie=self.untie or self.recipe is None,
            strict=self.strict,
            nonfinite=self.nonfinite,
            statistics=self.statistics,
        )

    def describe(self, model: nn.Module) -> Self:
        """Take down which quantized layers a model has, and which of their tensors are shared.

        Example:
            >>> from quantization import QWQALinearLayer
            >>> QuantizationConfig("w4").describe(nn.Sequential(QWQALinearLayer(8, 8))).layers
            {'0': 'w8a16'}
        """
        modules = list(model.named_modules(remove_duplicate=False))
        layers = {n: m for n, m in modules if isinstance(m, QuantizedModule)}
        self.layers = {name: str(form_of(layer)) for name, layer in layers.items()}
        self.unfuse_experts |= any(isinstance(module, UnfusedExperts) for _, module in modules)
        others = [pair for pair in modules if pair[0] not in layers]
        firsts = {memory_of(tensor): key for key, tensor in reversed(list(_tensors(others)))}
        self.ties = {}
        for key, tensor in _tensors(layers.items()):
            first = firsts.setdefault(memory_of(tensor), key)
            if first != key:
                self.ties[key] = first
        return self

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The config of a model whose layers were quantized by hand: a table without a recipe.

        Example:
            >>> from quantization import PackedLinearLayer
            >>> QuantizationConfig.of(nn.Sequential(PackedLinearLayer(8, 8, scheme="w3"))).layers
            {'0': 'w3'}
        """
        config = cls("w8", ())
        config.recipe = None
        return config.describe(model)


def rules_of(layers: Mapping[str, str] | None) -> dict[Any, Scheme | str]:
    """Rules that give each layer of a table its scheme, and no other layer any.

    Example:
        >>> [scheme for scheme in rules_of({"a": "w4", "b": "w4", "c": "w8a16"}).values()]
        [Scheme(bits=4), 'w8a16']
    """
    names: dict[str, set[str]] = {}
    for name, form in (layers or {}).items():
        names.setdefault(form, set()).add(name)

    def among(chosen: set[str]) -> Any:
        return lambda name, module: name in chosen

    return {
        among(chosen): form if form == W8A16 else scheme_of_form(form)
        for form, chosen in names.items()
    }


def _tensors(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of modules, not of their children, by keys of a state dict; those of any size."""
    for name, module in modules:
        prefix = f"{name}." if name else ""
        for key, tensor in (module._parameters | module._buffers).items():
            if tensor is not None and tensor.numel():
                yield prefix + key, tensor


def _check_pattern(pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise TypeError(
            f"{pattern!r:.80} cannot be saved with the model: patterns of a QuantizationConfig are "
            "names, globs and 're:...'; quantize_model(model, ...) takes types and predicates too"
        )


def _plain_recipe(recipe: Any) -> str | list[dict[str, str | None]]:
    """A recipe in plain values; a list keeps the order of rules, as JSON objects get sorted."""
    lines = read_recipe(recipe)
    for line in lines:
        _check_pattern(line.pattern)
        if not isinstance(line.rule.method, str):
            raise TypeError(
                f"the method {line.rule.method!r:.80} cannot be saved with the model: give it a "
                "name by quantization.register_method"
            )
    if not isinstance(recipe, Mapping):
        return str(lines[0].rule)
    names = [None if line.scheme is None else str(line.rule) for line in lines]
    return [{"pattern": line.pattern, "scheme": n} for line, n in zip(lines, names, strict=True)]


def _recipe_from(plain: Any) -> Any:
    """The recipe of plain values; a dict of rules is one already."""
    if not isinstance(plain, list):
        return plain
    rules = {}
    for rule in plain:
        match rule:
            case {"pattern": str(pattern), "scheme": str() | None as scheme, **rest} if not rest:
                rules[pattern] = scheme
            case _:
                raise ValueError(
                    "quantization_config: a rule is {'pattern': ..., 'scheme': ...}, not "
                    f"{rule!r:.80}"
                )
    return rules
