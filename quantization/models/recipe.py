"""A recipe: which layer of a model gets which scheme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from quantization.layers.quantized_module import QuantizedModule
from quantization.schemes.scheme import Scheme, scheme_of
from quantization.swap import walker
from quantization.swap.patterns import Pattern, matching, pattern_text
from quantization.swap.walker import Site

#: In the place of a scheme: the int8 layer, :class:`quantization.QWQALinearLayer`.
W8A16 = "w8a16"

#: A scheme for all linear layers, or ordered rules, of which the first that matches is followed.
Recipe = Scheme | str | Mapping[Pattern, Scheme | str | None]

_EVERYTHING = "*"


class Rule(NamedTuple):
    """One line of a recipe: the layers that ``pattern`` matches get ``scheme``; None: stay.

    The scheme :data:`W8A16` stands for the int8 layer.
    """

    pattern: Pattern
    scheme: Scheme | str | None

    def __str__(self) -> str:
        return pattern_text(self.pattern)


class Rules:
    """The rules of a recipe, held against a model.

    Args:
        recipe: a :data:`Recipe`.
        sites: all places of the model.

    Raises:
        TypeError: for a recipe, a pattern or a scheme of a wrong kind.
        ValueError: for no rules, a name of no scheme, or a pattern that matches no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(8, 8))
        >>> rules = Rules({"0": "w8", nn.Embedding: "w4g64a"}, list(walker.walk(model)))
        >>> rules.for_linear(model[0])
        Rule(pattern='0', scheme=Scheme(bits=8))
        >>> str(rules.for_embedding(model[1]))
        'Embedding'
    """

    def __init__(self, recipe: Recipe, sites: list[Site]) -> None:
        self._rules = read_recipe(recipe)
        self._named = [set(matching(sites, rule.pattern)) for rule in self._rules]
        self._inside = [set(_with_inside(sites, named)) for named in self._named]

    def for_linear(self, module: nn.Module) -> Rule | None:
        """The first rule that names the module or something that holds it."""
        pairs = zip(self._rules, self._inside, strict=True)
        return next((rule for rule, ids in pairs if id(module) in ids), None)

    def for_embedding(self, module: nn.Module) -> Rule | None:
        """The first rule that names the embedding itself, and not just everything."""
        pairs = zip(self._rules, self._named, strict=True)
        return next(
            (rule for rule, ids in pairs if id(module) in ids and _names_embeddings(rule)), None
        )


def read_recipe(recipe: Any) -> list[Rule]:
    """The rules of a recipe.

    Raises:
        TypeError: for another kind of recipe, or a scheme of a wrong kind.
        ValueError: for no rules, or a name of no scheme.

    Example:
        >>> read_recipe("w4g64a")[0].pattern
        '*'
    """
    if isinstance(recipe, Scheme | str):
        return [Rule(_EVERYTHING, _form_of(recipe))]
    if not isinstance(recipe, Mapping):
        raise TypeError(
            f"the recipe is {recipe!r:.60}; give a Scheme, its short name such as 'w4g64a', or "
            "rules {pattern: scheme or None}"
        )
    if not recipe:
        raise ValueError("the recipe has no rules; {'*': 'w4g64a'} is one for all linear layers")
    return [Rule(pattern, _scheme_of(pattern, value)) for pattern, value in recipe.items()]


def _form_of(value: Any) -> Scheme | str:
    return W8A16 if value == W8A16 else scheme_of(value)


def _scheme_of(pattern: Pattern, value: Any) -> Scheme | str | None:
    try:
        return None if value is None else _form_of(value)
    except (TypeError, ValueError) as error:
        error.add_note(f"in the rule {pattern_text(pattern)} of the recipe")
        raise


def converts_quantized(rule: Rule) -> bool:
    """Whether a rule asks for layers that are quantized already, by naming a type of them.

    Example:
        >>> from quantization import QWQALinearLayer
        >>> converts_quantized(Rule(QWQALinearLayer, Scheme(4)))
        True
    """
    return isinstance(rule.pattern, type) and issubclass(rule.pattern, QuantizedModule)


def _names_embeddings(rule: Rule) -> bool:
    if isinstance(rule.pattern, type):
        return issubclass(rule.pattern, nn.Embedding)
    return rule.pattern != _EVERYTHING


def _with_inside(sites: list[Site], named: set[int]) -> dict[int, str]:
    return walker.inherit(sites, dict.fromkeys(named, ""))
