"""``python -m unittest`` over a test file, or a folder of them, runs what pytest runs.

unittest asks each module that it loads for ``load_tests``. Here it gets a suite that runs pytest on
the file and tells unittest of each case by its pytest name: passed, failed, skipped. Fixtures,
parameters and the options of ``pyproject.toml`` work as ever.
"""

from __future__ import annotations

import io
import sys
import unittest
from collections.abc import Callable
from contextlib import redirect_stdout
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

LoadTests = Callable[[unittest.TestLoader, unittest.TestSuite, str | None], unittest.TestSuite]


def pytest_cases(file: str) -> LoadTests:
    """The ``load_tests`` of a test file: its cases, as pytest finds them; of an ``__init__.py``:
    those of its folder.
    """
    path = Path(file).resolve()

    def load_tests(
        loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None
    ) -> unittest.TestSuite:
        return PytestSuite(path, loader.testNamePatterns)

    return load_tests


class Case(unittest.TestCase):
    """What unittest sees of a pytest case: its name."""

    def __init__(self, nodeid: str) -> None:
        super().__init__()
        self.nodeid = nodeid

    def runTest(self) -> None:
        raise NotImplementedError("the suite runs its cases")

    def id(self) -> str:
        return self.nodeid

    __str__ = __repr__ = id

    def shortDescription(self) -> None:
        return None


class PytestSuite(unittest.TestSuite):
    """Runs pytest on a file or folder."""

    def __init__(self, path: Path, patterns: list[str] | None = None) -> None:
        super().__init__()
        self.path = path.parent if path.name == "__init__.py" else path
        self.patterns = patterns  # those of unittest's option -k

    def run(self, result: unittest.TestResult, debug: bool = False) -> unittest.TestResult:
        import pytest

        # unittest has imported the file: pytest does so again, to make its asserts tell more.
        for name, module in list(sys.modules.items()):
            if getattr(module, "__file__", None) == str(self.path):
                del sys.modules[name]
        said = io.StringIO()
        reporter = Reporter(result, self.patterns)
        with redirect_stdout(said):
            code = pytest.main([str(self.path)], plugins=[reporter])
        told = code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if not told and not reporter.failed:
            reporter.tell(str(self.path), "error", said.getvalue())
        return result


class Reporter:
    """A plugin of pytest that tells a unittest result what happens."""

    def __init__(self, result: unittest.TestResult, patterns: list[str] | None) -> None:
        self.result = result
        self.patterns = patterns
        self.failed = False

    def tell(self, nodeid: str, outcome: str, text: str = "") -> None:
        """One case from its start to its end."""
        case = Case(nodeid)
        what = (AssertionError, AssertionError(f"\n{text}"), None)
        self.failed |= outcome in ("failure", "error")
        self.result.startTest(case)
        match outcome:
            case "success":
                self.result.addSuccess(case)
            case "failure":
                self.result.addFailure(case, what)
            case "error":
                self.result.addError(case, what)
            case "skip":
                self.result.addSkip(case, text)
            case "expected failure":
                self.result.addExpectedFailure(case, what)
        self.result.stopTest(case)

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        if self.patterns:
            kept = [i for i in items if any(fnmatchcase(i.nodeid, p) for p in self.patterns)]
            config.hook.pytest_deselected(items=[item for item in items if item not in kept])
            items[:] = kept

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tell(report.nodeid, "error", report.longreprtext)
        elif report.skipped:
            self.tell(report.nodeid, "skip", _reason(report))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(report, "wasxfail") and report.skipped:
            self.tell(report.nodeid, "expected failure", report.longreprtext)
        elif report.failed:
            outcome = "failure" if report.when == "call" else "error"
            self.tell(report.nodeid, outcome, _text(report))
        elif report.skipped:
            self.tell(report.nodeid, "skip", _reason(report))
        elif report.when == "call":
            self.tell(report.nodeid, "success")

    def pytest_runtest_logfinish(self) -> None:
        if self.result.shouldStop:  # by unittest's option -f
            self.session.shouldstop = "unittest stops here"


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    return text.removeprefix("Skipped: ")


def _text(report: pytest.TestReport) -> str:
    """Where and why a case failed, and what it printed."""
    printed = [f"---- {title}\n{text}" for title, text in report.sections if text]
    return "\n".join([report.longreprtext, *printed])
