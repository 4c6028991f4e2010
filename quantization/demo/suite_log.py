"""What the end-to-end suite says, and which of its checks held."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TextIO

from quantization.console.table import table_of


@dataclass
class SuiteLog:
    """Prints stages, lines and checks as they come, and keeps them for `--json` and the exit code.

    Attributes:
        out: where lines go.
        figures: what was measured, by name; plain numbers, strings, lists and dicts.
        checks: every check with its outcome.

    Example:
        >>> import sys
        >>> log = SuiteLog(sys.stdout)
        >>> log.at_most("memory share", 0.26, 0.27)
          ok    memory share: 0.26 (at most 0.27)
        >>> log.failed
        []
    """

    out: TextIO
    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    _stages: int = 0

    def stage(self, title: str) -> None:
        """Begin a numbered stage."""
        self._stages += 1
        self.line(f"\n[{self._stages}] {title}")

    def line(self, text: str = "") -> None:
        """Print a line at once."""
        print(text, file=self.out, flush=True)

    def true(self, name: str, holds: bool, detail: str = "") -> None:
        """Check that something holds."""
        self._check(name, holds, detail)

    def at_most(self, name: str, value: float, bound: float) -> None:
        """Check that a value does not exceed its bound; NaN fails."""
        self._check(name, value <= bound, f"{value:.4g} (at most {bound:.4g})", value, bound)

    def _check(self, name: str, holds: bool, detail: str, *numbers: float) -> None:
        entry = {"name": name, "passed": bool(holds)}
        self.checks.append(entry | dict(zip(("value", "bound"), numbers, strict=False)))
        tail = f": {detail}" if detail else ""
        self.line(f"  {'ok    ' if holds else 'FAILED'}{name}{tail}")

    @property
    def failed(self) -> list[str]:
        """Names of the checks that did not hold."""
        return [check["name"] for check in self.checks if not check["passed"]]

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        """Print columns.

        Example:
            >>> import sys
            >>> SuiteLog(sys.stdout).table(["codes", "row"], [["int8", "1 %"]])
              codes  row
              int8   1 %
        """
        for line in table_of(header, rows).to_text().splitlines():
            self.line(f"  {line}")
