"""Programs on several processes: started by torchrun, each telling what its checks found."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PASSED = "passed"


def torchrun(count: int, script: Path, *arguments: str, timeout: float = 240) -> str:
    """What the program printed; an AssertionError with its errors if it failed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", str(script), *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def failures(count: int, script: Path, folder: Path, *names: str) -> list[str]:
    """What went wrong, by check and rank, in the checks of a program: all, or those named."""
    torchrun(count, script, str(folder), *names)
    told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
    assert all(each.keys() == set(names or names_of_checks(script)) for each in told)
    return [
        f"{name}, process {rank} of {count}: {text}"
        for rank, each in enumerate(told)
        for name, text in each.items()
        if text != PASSED
    ]


def names_of_checks(script: Path) -> list[str]:
    """The checks of a program, read off its text."""
    body = ast.parse(script.read_text()).body
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return [name.removeprefix("check_") for name in functions if name.startswith("check_")]


def run_checks(checks: dict[str, Callable[[], None]]) -> None:
    """The body of such a program: run checks, all or those named, and write what was found.

    One that fails on one rank leaves the others waiting: they give up after a while, and say so.
    """
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(checks)
    found = {}
    for name in names:
        torch.manual_seed(0)
        try:
            checks[name]()
            found[name] = PASSED
        except BaseException:
            found[name] = traceback.format_exc()
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
