"""Cases in children: a process that has imported torch once forks one for each case.

``python -m tests.hostile.server`` reads names of cases, a line each, and answers with what came of
each: ``"ok"``, or an error, a signal, a hang.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@cache
def _server() -> Any:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.hostile.server"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def outcome(name: str) -> str:
    """What came of a case."""
    server = _server()
    server.stdin.write(f"{name}\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def main() -> None:
    """Serve the cases of models and of files."""
    import quantization.checkpoint
    from benchmarks.hostile import serve
    from benchmarks.hostile_cases import CASES
    from benchmarks.hostile_libraries import OURS
    from tests.hostile.file_cases import CASES as FILES

    assert quantization.checkpoint.load_quantized  # so that children need not import it
    serve({name: partial(case, OURS) for name, case in CASES.items()} | FILES)


if __name__ == "__main__":
    main()
