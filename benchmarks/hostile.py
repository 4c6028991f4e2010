"""``python -m benchmarks hostile``: the hostile battery over every library that is installed.

Each case runs in a child of its own, forked from a process that has imported torch and runs one
thread, so that a crash or a hang is the case's own and the next costs milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import hostile_modules  # noqa: F401  adds its cases
from benchmarks.hostile_cases import CASES
from benchmarks.hostile_libraries import LIBRARIES, Library

LIMIT = 120.0  # seconds, of which a busy machine may need many
OK = "ok"


def in_child(function: Callable[[], Any], limit: float = LIMIT) -> str:
    """What came of a function in a forked child: ``"ok"``, or its error, signal or hang."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.setsid()  # so that what it forks ends with it
        _run_and_exit(function, writer)
    os.close(writer)
    try:
        if not select.select([reader], [], [], limit)[0]:
            return f"hangs ({limit:g} s)"
        told = b"".join(iter(lambda: os.read(reader, 1 << 16), b"")).decode()
    finally:
        os.close(reader)
        try:
            os.killpg(child, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    return told or f"dies by {signal.Signals(os.WTERMSIG(status)).name}"


def _run_and_exit(function: Callable[[], Any], writer: int) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    told = OK
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function()
    except BaseException as error:  # a library may raise anything
        lines = str(error).strip().splitlines()
        told = f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
        told = told.removeprefix("AssertionError: ")
    os.write(writer, told.encode())
    os._exit(0)


def run(library: Library, name: str, limit: float = LIMIT) -> str:
    """What came of a case of the battery with a library."""
    return in_child(lambda: CASES[name](library), limit)


def serve(functions: Mapping[str, Callable[[], Any]]) -> None:
    """Run what is named on each line of stdin, and write what came of it as a line of JSON."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(in_child(functions[line.rstrip("\n")])), flush=True)


def main(arguments: list[str]) -> int:
    """Run the battery, print a table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks hostile", description=__doc__)
    parser.add_argument("--only", help="libraries, such as 'torchao,quanto'")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a case")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="every outcome; what is there is kept"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",") if options.only else [each.name for each in LIBRARIES]
    found = [each for each in LIBRARIES if each.name in chosen and each.version is not None]
    for each in LIBRARIES:
        if each.name in chosen and each.version is None:
            print(f"not run: {each.name}: {each.package} is not installed")
    torch.set_num_threads(1)
    outcomes = {}
    if options.json and options.json.exists():
        outcomes = json.loads(options.json.read_text())
    for each in found:
        title = f"{each.name} {each.version}"
        if outcomes.get(title, {}).keys() != CASES.keys():
            outcomes[title] = _outcomes(each, options.limit)
        if options.json:
            options.json.write_text(json.dumps(outcomes, indent=1) + "\n")
    text = table(found, outcomes, f"python -m benchmarks hostile {' '.join(arguments)}".strip())
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    return 0


def _outcomes(library: Library, limit: float) -> dict[str, str]:
    print(f"{library.name} {library.version}", end=" ", flush=True)
    outcomes = {}
    for name in CASES:
        outcomes[name] = run(library, name, limit)
        print("." if outcomes[name] == OK else "F", end="", flush=True)
    print()
    return outcomes


def table(found: list[Library], outcomes: Mapping[str, Mapping[str, str]], command: str) -> str:
    """A table in Markdown: cases that all pass are named in a line below."""
    titles = [f"{each.name} {each.version}" for each in found]
    count = [sum(outcome == OK for outcome in outcomes[title].values()) for title in titles]
    lines = [
        f"`{command}`, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {len(CASES)} cases.",
        "",
        f"| case | {' | '.join(titles)} |",
        f"|---|{'---|' * len(found)}",
        f"| **passed** | {' | '.join(map(str, count))} |",
    ]
    same = []
    for name in CASES:
        row = [outcomes[title][name] for title in titles]
        if all(outcome == OK for outcome in row):
            same.append(name)
            continue
        cells = (cell.replace("|", "/").replace("<", "&lt;")[:60] for cell in row)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"All pass: {', '.join(same)}.", ""])
