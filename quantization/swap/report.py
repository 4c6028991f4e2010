"""What a replacement did to a model, layer by layer, in numbers and as a table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, Self, overload

from torch import nn

from quantization.console.columns import Column, shorter, size
from quantization.console.table import Table, Tabular
from quantization.methods.registry import method_name

#: Tables longer than this join layers whose names differ in numbers only.
_LONGEST_TABLE = 24

#: What a report shows of each :class:`Candidate`.
COLUMNS = (
    Column("called", "name", "layer"),
    Column("scheme"),
    Column("method_name", "text", "method", extra=True),
    Column("bits_per_weight", "number", "bits", ".2f", "a weight, scales and all included"),
    Column("shape", "number", "out x in"),
    Column("bytes_before", "bytes", "before"),
    Column("bytes_after", "bytes", "after"),
    Column("what", "text"),
)


@dataclass(frozen=True)
class Candidate:
    """One linear layer of the model.

    Attributes:
        name: its dotted name; ``""`` is the model itself.
        status: ``"replaced"``, ``"already"`` (it was of the target class before), ``"excluded"``
            (by a pattern) or ``"left"``.
        reason: why it was not replaced; for a replaced one empty, or what is worth knowing.
        kind: the class it had, by name.
        shape: (out_features, in_features), or None where there is no weight yet; all dimensions of
            a bare Parameter.
        bytes_before: of its weight and bias.
        bytes_after: of all tensors of what stands there now.
        aliases: further names of the same module.
        scheme: of its codes, where it has one to tell; else empty.
        bits_per_weight: of what stands there now, scales included; None for a float layer.
        method: how its codes were found: a name, or a function.
    """

    name: str
    status: str
    reason: str
    kind: str
    shape: tuple[int, ...] | None
    bytes_before: int
    bytes_after: int
    aliases: tuple[str, ...] = ()
    scheme: str = ""
    bits_per_weight: float | None = None
    method: Any = "rtn"

    @property
    def replaced(self) -> bool:
        """Whether this call replaced it."""
        return self.status == "replaced"

    noun: ClassVar[str] = "layers"

    @property
    def called(self) -> str:
        """What a table calls it: its name, and the first of its further ones."""
        more = f" (also {', '.join(self.aliases[:2])}{', ...' * (len(self.aliases) > 2)})"
        return (self.name or "(the model)") + more * bool(self.aliases)

    @property
    def what(self) -> str:
        """Status and reason."""
        return f"{self.status}: {self.reason}" if self.reason else self.status

    @property
    def method_name(self) -> str:
        """Of the method, where one other than rounding to nearest found the codes."""
        return "" if self.method == "rtn" else method_name(self.method)

    def together(self, members: Sequence[Candidate], name: str) -> Self:
        """One row for many that are alike, itself among them."""
        return replace(
            self,
            name=name,
            aliases=(),
            bytes_before=sum(member.bytes_before for member in members),
            bytes_after=sum(member.bytes_after for member in members),
        )

    @property
    def weights(self) -> int:
        """How many numbers its weight has."""
        return 0 if self.shape is None else prod(self.shape)


@dataclass(frozen=True)
class FloatTensor:
    """A tensor that stays in float.

    Attributes:
        name: its dotted name.
        shape: its shape.
        dtype: its dtype, by name.
        nbytes: its bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True, repr=False)
class ReplacementReport(Tabular[Candidate], Sequence[Candidate]):
    """What :func:`quantization.replace_linear_layers_with_w8a16` did; printing it gives a table.

    It is a sequence of :class:`Candidate`, one for each linear layer, in the order of the model;
    ``report["lm_head"]`` looks one up by any of its names. Printed, a long one joins layers whose
    names differ in numbers only; :meth:`table` has a row for each, to sort, filter and take
    elsewhere (:class:`quantization.console.table.Table`), as have ``to_dict()`` and the others.

    Attributes:
        model: the model. Where the model itself was a linear layer, no parent could be given the
            new one: then this is the new layer, and the old one is as it was.
        target: the class that was put in.
        candidates: the linear layers.
        float_tensors: parameters that stay in float, the biggest first.
        bytes_before: of the replaced layers, weights that are shared counted once.
        bytes_after: of what stands in their place.
        model_bytes_before: of all parameters and buffers of the model.
        model_bytes_after: the same, afterwards.
        coverage: share of the model's parameters that are weights of the target class, 0..1.
        quantized: False where only the structure was built (``quantize=False``).
        caller: the function that did it, where ``target`` does not tell.
        noun: what the candidates are.

    Example:
        >>> from quantization import QWQALinearLayer, Target, replace_linear_layers_with_w8a16
        >>> model = nn.Sequential(nn.Linear(256, 256), nn.LazyLinear(8))
        >>> report = replace_linear_layers_with_w8a16(model, Target.Linear(QWQALinearLayer))
        >>> len(report), len(report.replaced), report["0"].bytes_before, report["0"].bytes_after
        (2, 1, 263168, 67584)
        >>> print(report.left[0].reason)
        lazy: it has no weight yet; run the model once on an input first
    """

    model: nn.Module
    target: type[nn.Module]
    candidates: tuple[Candidate, ...]
    float_tensors: tuple[FloatTensor, ...]
    bytes_before: int
    bytes_after: int
    model_bytes_before: int
    model_bytes_after: int
    coverage: float
    quantized: bool = True
    caller: str = ""
    noun: str = "linear layers"

    @property
    def bits_per_weight(self) -> float:
        """Of the weights that are quantized now, scales and all included; 0 if there are none."""
        held = [c for c in self.candidates if c.bits_per_weight is not None]
        weights = sum(candidate.weights for candidate in held)
        bits = sum((candidate.bits_per_weight or 0) * candidate.weights for candidate in held)
        return bits / weights if weights else 0.0

    @property
    def replaced(self) -> list[Candidate]:
        """Those that this call replaced."""
        return self._having("replaced")

    @property
    def already(self) -> list[Candidate]:
        """Those that were of the target class before."""
        return self._having("already")

    @property
    def excluded(self) -> list[Candidate]:
        """Those that a pattern excludes."""
        return self._having("excluded")

    @property
    def left(self) -> list[Candidate]:
        """Those left although no pattern excludes them; each has a reason."""
        return self._having("left")

    def _having(self, status: str) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.status == status]

    def __len__(self) -> int:
        return len(self.candidates)

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.candidates)

    @overload
    def __getitem__(self, key: int | str) -> Candidate: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Candidate, ...]: ...
    def __getitem__(self, key):
        """A candidate by its place or by its name.

        Raises:
            KeyError: if no candidate has that name.
            IndexError: if there are not so many.
        """
        if not isinstance(key, str):
            return self.candidates[key]
        for candidate in self.candidates:
            if key == candidate.name or key in candidate.aliases:
                return candidate
        raise KeyError(f"{key!r} is no {self.noun.removesuffix('s')} of the model")

    def table(self) -> Table[Candidate]:
        """A row for each layer."""
        return Table(COLUMNS, self.candidates, self.headline, tuple(self.totals))

    def to_text(self, width: int | None = None) -> str:
        """As it is printed: a long one joins the layers of a family."""
        return replace(self.table(), rows=joined(self.candidates)).to_text(width)

    @property
    def headline(self) -> str:
        """How many layers became what."""
        what = "replaced" if self.quantized else "replaced (structure only, weights not quantized)"
        kind = "quantized" if self.caller else self.target.__name__
        counts = [f"{len(self.replaced)} of {len(self)} {self.noun} {what}"]
        counts += [f"{len(self.already)} already {kind}"] if self.already else []
        counts += [f"{len(self.excluded)} excluded"] if self.excluded else []
        counts += [f"{len(self.left)} left"] if self.left else []
        return f"ReplacementReport by {self.caller or self.target.__name__}: {', '.join(counts)}"

    @property
    def totals(self) -> list[str]:
        """Lines on bytes before and after, and on what stays in float."""
        ratio = f" ({self.bytes_after / self.bytes_before:.3f}x)" if self.bytes_before else ""
        kind = "quantized weights" if self.caller else f"weights of {self.target.__name__}"
        lines = [
            f"replaced layers: {size(self.bytes_before)} -> {size(self.bytes_after)}{ratio}",
            f"whole model: {size(self.model_bytes_before)} -> {size(self.model_bytes_after)}; "
            f"{self.coverage:.1%} of its parameters are {kind}"
            + (f", {self.bits_per_weight:.2f} bits each" if self.caller and self.coverage else ""),
        ]
        if self.float_tensors:
            biggest = ", ".join(
                f"{shorter(tensor.name)} {list(tensor.shape)} {tensor.dtype} {size(tensor.nbytes)}"
                for tensor in self.float_tensors[:3]
            )
            lines.append(f"biggest tensors left in float: {biggest}")
        if any(candidate.name == "" and candidate.replaced for candidate in self):
            lines.append("the model itself is the layer: go on with report.model")
        return lines


def joined(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The same; where there are many, one for each family of them, with the bytes of all.

    Example:
        >>> one = Candidate("layers.0.up", "replaced", "", "Linear", (8, 8), 256, 96)
        >>> many = [replace(one, name=f"layers.{i}.up") for i in range(30)]
        >>> [(family.called, family.bytes_after) for family in joined(many)]
        [('layers.*.up (30 layers)', 2880)]
    """
    families: dict[tuple, list[Candidate]] = {}
    for candidate in candidates:
        families.setdefault(_family(candidate, len(candidates)), []).append(candidate)
    return tuple(_as_one(family) for family in families.values())


def _family(candidate: Candidate, count: int) -> tuple:
    """What joins candidates in one row; names are unique, so in a short table nothing does."""
    many = count > _LONGEST_TABLE
    name = re.sub(r"(?<![^.])\d+(?![^.])", "*", candidate.name) if many else candidate.name
    return name, candidate.what, candidate.shape, candidate.scheme, candidate.method_name


def _as_one(members: list[Candidate]) -> Candidate:
    name = f"{_family(members[0], _LONGEST_TABLE + 1)[0]} ({len(members)} {members[0].noun})"
    return members[0].together(members, name) if len(members) > 1 else members[0]
