"""A recipe: which layer of a model gets which scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from quantization.layers.quantized_module import QuantizedModule
from quantization.methods.registry import Method, method_name, method_of
from quantization.schemes.scheme import Scheme, scheme_of
from quantization.swap import walker
from quantization.swap.patterns import Pattern, matching, pattern_text
from quantization.swap.walker import Site

#: In the place of a scheme: the int8 layer, :class:`quantization.QWQALinearLayer`.
W8A16 = "w8a16"

_EVERYTHING = "*"
_RTN = "rtn"


@dataclass(frozen=True)
class Rule:
    """What a layer becomes: its scheme, and the method that finds its codes.

    Attributes:
        scheme: a :class:`quantization.Scheme` or its short name; ``"w8a16"`` for the int8 layer,
            which has one method only; None: the layer stays in float. A name may bring its method
            along: ``"w4g32a:lsq"``.
        method: a name of :func:`quantization.method_names`, or a function ``(weight, scheme,
            statistics) -> PackedWeights``.

    Raises:
        TypeError, ValueError: for no scheme or no method; the message says why.

    Example:
        >>> Rule("w4g32a:lsq")
        Rule(scheme=Scheme(bits=4, granularity=Granularity.PerGroup(by=32, dim=1), \
mode=Mode.Asymmetric), method='lsq')
        >>> str(Rule("nf4g32", method="lsq")), str(Rule(None)), str(Rule("w8"))
        ('nf4g32:lsq', 'None', 'w8')
    """

    scheme: Scheme | str | None
    method: str | Method = _RTN

    def __post_init__(self) -> None:
        scheme, method = self.scheme, self.method
        if isinstance(scheme, str) and ":" in scheme:
            scheme, _, named = scheme.partition(":")
            if method not in (_RTN, named):
                raise ValueError(f"{self.scheme!r} and method={method!r} name two methods")
            method = named
        method_of(method)
        if scheme == W8A16 and method != _RTN:
            raise ValueError(
                f"{W8A16!r} is the int8 layer, which knows no method {method_name(method)!r}: "
                f"'w8:{method_name(method)}' makes packed codes of 8 bits"
            )
        if scheme is not None and scheme != W8A16:
            scheme = scheme_of(scheme)
        object.__setattr__(self, "scheme", scheme)
        object.__setattr__(self, "method", method)

    def __str__(self) -> str:
        suffix = "" if self.method == _RTN else f":{method_name(self.method)}"
        return f"{self.scheme}{suffix}"


#: A scheme for all linear layers, or ordered rules, of which the first that matches is followed.
Recipe = Scheme | str | Rule | Mapping[Pattern, Scheme | str | Rule | None]


class Line(NamedTuple):
    """One line of a recipe: the layers that ``pattern`` matches follow ``rule``."""

    pattern: Pattern
    rule: Rule

    @property
    def scheme(self) -> Scheme | str | None:
        """Of the rule."""
        return self.rule.scheme

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
        Line(pattern='0', rule=Rule(scheme=Scheme(bits=8), method='rtn'))
        >>> str(rules.for_embedding(model[1]))
        'Embedding'
    """

    def __init__(self, recipe: Recipe, sites: list[Site]) -> None:
        self._rules = read_recipe(recipe)
        self._named = [set(matching(sites, rule.pattern)) for rule in self._rules]
        self._inside = [set(_with_inside(sites, named)) for named in self._named]

    def for_linear(self, module: nn.Module) -> Line | None:
        """The first rule that names the module or something that holds it."""
        pairs = zip(self._rules, self._inside, strict=True)
        return next((rule for rule, ids in pairs if id(module) in ids), None)

    def for_embedding(self, module: nn.Module) -> Line | None:
        """The first rule that names the embedding itself, and not just everything."""
        pairs = zip(self._rules, self._named, strict=True)
        return next(
            (rule for rule, ids in pairs if id(module) in ids and _names_embeddings(rule)), None
        )


def read_recipe(recipe: Any) -> list[Line]:
    """The rules of a recipe.

    Raises:
        TypeError: for another kind of recipe, or a scheme of a wrong kind.
        ValueError: for no rules, or a name of no scheme.

    Example:
        >>> read_recipe("w4g64a:lsq")[0].pattern
        '*'
    """
    if isinstance(recipe, Scheme | str | Rule):
        return [Line(_EVERYTHING, _rule_of(recipe))]
    if not isinstance(recipe, Mapping):
        raise TypeError(
            f"the recipe is {recipe!r:.60}; give a Scheme, its short name such as 'w4g64a', or "
            "rules {pattern: scheme or None}"
        )
    if not recipe:
        raise ValueError("the recipe has no rules; {'*': 'w4g64a'} is one for all linear layers")
    lines = []
    for pattern, value in recipe.items():
        try:
            lines.append(Line(pattern, _rule_of(value)))
        except (TypeError, ValueError) as error:
            error.add_note(f"in the rule {pattern_text(pattern)} of the recipe")
            raise
    return lines


def _rule_of(value: Any) -> Rule:
    return value if isinstance(value, Rule) else Rule(value)


def converts_quantized(line: Line) -> bool:
    """Whether a line asks for layers that are quantized already, by naming a type of them.

    Example:
        >>> from quantization import QWQALinearLayer
        >>> converts_quantized(Line(QWQALinearLayer, Rule("w4")))
        True
    """
    return isinstance(line.pattern, type) and issubclass(line.pattern, QuantizedModule)


def _names_embeddings(line: Line) -> bool:
    if isinstance(line.pattern, type):
        return issubclass(line.pattern, nn.Embedding)
    return line.pattern != _EVERYTHING


def _with_inside(sites: list[Site], named: set[int]) -> dict[int, str]:
    return walker.inherit(sites, dict.fromkeys(named, ""))
