"""What the end-to-end suite says, and which of its checks held."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any, TextIO


@dataclass
class SuiteLog:
    """Prints stages, lines and checks as they come, and keeps them for `--json` and the exit code.

    Attributes:
        out: where lines go.
        figures: what was measured, by name; plain numbers, strings, lists and dicts.
        checks: every check with its outcome.

    Example:
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

    def progress(self, label: str) -> Any:
        """A callable(done, total) that shows progress on stderr, at most every half second.

        On a terminal one line is rewritten; elsewhere only each tenth is told.
        """
        started, last = time.monotonic(), [0.0, -1]

        def show(done: int, total: int) -> None:
            now, tenth = time.monotonic(), 10 * done // total
            if sys.stderr.isatty():
                if now - last[0] > 0.5 or done >= total:
                    last[0] = now
                    end = "\r\033[K" if done >= total else ""
                    text = f"\r  {label}: {100 * done // total} %, {now - started:.0f} s"
                    print(text, end=end, file=sys.stderr, flush=True)
            elif tenth > last[1] and now - last[0] > 2:
                last[0], last[1] = now, tenth
                print(f"  {label}: {10 * tenth} %", file=sys.stderr, flush=True)

        return show

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        """Print columns, the first to the left and the others to the right.

        Example:
            >>> SuiteLog(sys.stdout).table(["code", "row"], [["int8", "1 %"]])
              code  row
              int8  1 %
        """
        widths = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header))]
        for row in [header, *rows]:
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            self.line("  " + "  ".join(cells))
