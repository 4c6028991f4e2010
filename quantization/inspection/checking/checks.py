"""What is found when layers are checked: a row a layer, and whether all is well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantization.console.columns import Column
from quantization.console.table import Table, Tabular

__all__ = ["Checked", "Checks"]


@dataclass(frozen=True)
class Checked:
    """A layer that was checked.

    Attributes:
        layer: its dotted name.
        scheme: its scheme, or ``"w8a16"``.
        checks: what was looked at.
        problems: what is wrong, a sentence each.
        worst: the largest error as a share of what it may be, where errors were measured.
    """

    layer: str
    scheme: str
    checks: tuple[str, ...]
    problems: tuple[str, ...] = ()
    worst: float | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def what(self) -> str:
        """``"ok"``, or the problems."""
        return "; ".join(self.problems) or "ok"

    @property
    def looked_at(self) -> str:
        """The checks in one text."""
        return ", ".join(self.checks)


@dataclass(frozen=True, repr=False)
class Checks(Tabular[Checked], Sequence[Checked]):
    """The layers of a model, checked; print it, or ask :attr:`ok`.

    Attributes:
        layers: each layer.
        title: what was done.

    Example:
        >>> found = Checks((Checked("0", "w4", ("codes",)),), "verify")
        >>> found.ok, found
        (True, verify: 1 layers, all is well
        layer  scheme  checked  what
        0      w4      codes    ok)
    """

    layers: tuple[Checked, ...]
    title: str

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong anywhere."""
        return not self.failed

    @property
    def failed(self) -> list[Checked]:
        """Layers with problems."""
        return [layer for layer in self.layers if not layer.ok]

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, key: Any) -> Any:
        return self.table()[key]

    def table(self) -> Table[Checked]:
        """A row for each layer."""
        columns = (
            Column("layer", "name"),
            Column("scheme"),
            Column("looked_at", "text", "checked", extra=True),
            Column("worst", "number", "of bound", ".1%", "largest error, of what it may be"),
            Column("what"),
        )
        said = f"{len(self.failed)} with problems" if self.failed else "all is well"
        return Table(columns, self.layers, f"{self.title}: {len(self)} layers, {said}")
