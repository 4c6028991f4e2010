"""``python -m benchmarks``: measure, print, and write what is asked for."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import quantization
from benchmarks import accuracy, hostile, machine, session
from benchmarks.bench_backward import run_backward
from benchmarks.bench_files import run_files
from benchmarks.bench_in_a_model import run_in_a_model
from benchmarks.bench_linear import run_linear
from benchmarks.bench_model import run_model
from benchmarks.bench_overhead import run_overhead
from benchmarks.bench_pack import run_pack
from benchmarks.bench_packed import run_packed
from benchmarks.bench_packed_model import run_packed_model
from benchmarks.bench_quantize import run_quantize
from benchmarks.records import Results
from benchmarks.report import markdown, summary_grid
from benchmarks.roofline import PlotError, plot
from benchmarks.scheme_plot import plot_schemes
from benchmarks.session import SECTIONS, Session, Settings
from benchmarks.summary import Verdict, summarize
from benchmarks.tables import print_columns

RUNNERS: dict[str, Callable[[Session], None]] = {
    "in_a_model": run_in_a_model,
    "linear": run_linear,
    "packed": run_packed,
    "backward": run_backward,
    "quantize": run_quantize,
    "pack": run_pack,
    "overhead": run_overhead,
    "files": run_files,
    "model": run_model,
    "packed_model": run_packed_model,
}


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; the exit code is 0 unless the arguments are wrong."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["accuracy"]:
        return accuracy.main(given[1:])
    if given[:1] == ["hostile"]:
        return hostile.main(given[1:])
    if given[:1] == ["families"]:
        return import_module("benchmarks.families").main(given[1:])  # needs transformers
    options = _parser().parse_args(given)
    if options.read:
        return _tell_again(options)
    command = " ".join(["python -m benchmarks", *given])
    run = Session(_settings(options), command)
    run.say(machine.line(run.results.machine))
    run.say(command)
    for section in SECTIONS:
        if section in run.settings.sections:
            RUNNERS[section](run)
    _finish(run, options)
    return 0


def _tell_again(options: argparse.Namespace) -> int:
    """The tables and the picture of an earlier run."""
    entry = json.loads(options.read.read_text())
    results, settings = Results.from_dict(entry), entry["settings"]
    best_isa = settings["isas"][0]
    verdicts = summarize(results, best_isa, settings["are_small"])
    text = markdown(results, verdicts, best_isa, every_cell=False)
    for failure in _draw(results, options):
        print(failure, file=sys.stderr)
    if options.markdown:
        options.markdown.write_text(text)
    else:
        print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time the kernels beside every installed peer, turn by turn, and against the "
        "limits of the machine, measured in the same run.",
        epilog="python -m benchmarks accuracy --help: what each way to quantize loses; "
        "python -m benchmarks hostile --help: what each library makes of hostile models; "
        "python -m benchmarks families --help: T5 and its kin.",
    )
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--full", action="store_true", help="every cell, and the language models")
    extent.add_argument("--smoke", action="store_true", help="tiny shapes, in seconds")
    parser.add_argument("--only", type=_list_of(SECTIONS), help=f"out of {','.join(SECTIONS)}")
    parser.add_argument("--isa", type=_isas, help="instruction sets to force; reference too")
    parser.add_argument("--threads", type=_threads, help="such as 1,all (the default)")
    parser.add_argument("--dtype", type=_list_of(("float32", "bfloat16", "float16")))
    parser.add_argument("--shape", type=_shapes, help="out x in, such as 4096x4096,768x768")
    parser.add_argument("--tokens", type=_numbers, help="rows of activations, such as 1,16")
    parser.add_argument("--rounds", type=_number, help="samples of a candidate, at most")
    parser.add_argument("--seconds", type=float, help="of a cell, all candidates together")
    parser.add_argument(
        "--against", metavar="COMMIT", help="is built in a temporary folder; in_a_model times it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="every number")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables and the summary")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="the roofline (matplotlib)")
    parser.add_argument(
        "--plot-schemes", type=Path, metavar="FILE.svg", help="packed_model (matplotlib)"
    )
    parser.add_argument("--read", type=Path, metavar="FILE", help="of --json: tell it, in short")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    threads = options.threads or tuple(sorted({1, machine.cores()}))
    profile = session.full if options.full else session.smoke if options.smoke else session.quick
    chosen = profile(threads)
    named = {
        "sections": options.only,
        "isas": options.isa,
        "dtypes": options.dtype,
        "shapes": options.shape,
        "tokens": options.tokens,
        "packed_shapes": options.shape,
        "cold_shapes": options.shape,
        "against": options.against,
        "packed_tokens": options.tokens,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "threads": options.threads,
    }
    return dataclasses.replace(chosen, **{k: v for k, v in named.items() if v is not None})


def _finish(run: Session, options: argparse.Namespace) -> None:
    """Print the summary, and write the files that are asked for."""
    results, best_isa = run.results, run.settings.isas[0]
    if run.limits:
        results.limits = run.limits.best()
    verdicts = summarize(results, best_isa, run.settings.are_small)
    if failures := _draw(results, options):
        results.absent["plot"] = "; ".join(failures)
    _print_summary(run, verdicts)
    if options.markdown:
        options.markdown.write_text(markdown(results, verdicts, best_isa))
    if options.json:
        entry: dict[str, Any] = {
            "command": results.command,
            "machine": results.machine,
            "settings": dataclasses.asdict(run.settings),
            "limits": results.limits,
            "absent": results.absent,
            "summary": [verdict.to_dict() for verdict in verdicts],
            "rows": [row.to_dict() for row in results.rows],
        }
        options.json.write_text(json.dumps(entry, indent=1) + "\n")


def _draw(results: Results, options: argparse.Namespace) -> list[str]:
    """Make the pictures that are asked for; why one could not be made."""
    failures = []
    for path, draw in ((options.plot, plot), (options.plot_schemes, plot_schemes)):
        try:
            if path:
                draw(results, path)
        except PlotError as error:
            failures.append(str(error))
    return failures


def _print_summary(run: Session, verdicts: list[Verdict]) -> None:
    run.say(f"\n== figures, on {machine.line(run.results.machine)}")
    if verdicts:
        print_columns(run.say, *summary_grid(verdicts))
    for verdict in verdicts:
        if verdict.missed:
            run.say(f"\nmissed, {verdict.title}:")
            for text in verdict.missed:
                run.say(f"  {text}")
    for name, reason in run.results.absent.items():
        run.say(f"not measured: {name}: {reason}")


# ---- what the arguments look like ------------------------------------------------------------


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _list_of(allowed: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        for name in _names(text):
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
        return _names(text)

    return parse


def _isas(text: str) -> tuple[str, ...]:
    return _list_of(quantization.isas())(text)


def _number(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_number(part) for part in _names(text))


def _threads(text: str) -> tuple[int, ...]:
    numbers = (machine.cores() if part == "all" else _number(part) for part in _names(text))
    return tuple(dict.fromkeys(numbers))


def _shapes(text: str) -> tuple[session.Shape, ...]:
    pairs = [part.lower().split("x") for part in _names(text)]
    for pair in pairs:
        if len(pair) != 2:
            raise argparse.ArgumentTypeError(f"{'x'.join(pair)!r} is no shape: write 4096x11008")
    return tuple((_number(rows), _number(columns)) for rows, columns in pairs)


if __name__ == "__main__":
    sys.exit(main())
