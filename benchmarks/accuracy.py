"""``python -m benchmarks accuracy``: what is lost by each way to quantize, at how many bits."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quantization
from benchmarks import accuracy_report, machine
from benchmarks.accuracy_cells import CELLS, Cell
from benchmarks.accuracy_nets import NAMES, Net, copied, load
from benchmarks.accuracy_peers import PEERS, AbsentError
from benchmarks.accuracy_texts import TextError
from benchmarks.harness import first_line
from benchmarks.session import threads_of_torch
from quantization.demo.model_download import ModelError


def main(arguments: list[str]) -> int:
    """Measure what the command line asks for, print the table, write what is asked for."""
    options = _parser().parse_args(arguments)
    if options.read:
        results = json.loads(options.read.read_text())
        accuracy_report.finish(results, options)
        return 0
    results = _begun(options, arguments)
    with threads_of_torch(options.threads):
        for name in options.models:
            try:
                net = load(name, options.text, options.count, options.rescale, options.seed)
            except (ModelError, TextError) as error:
                results["absent"][name] = str(error)
                continue
            for cell in chosen(options.only):
                if not _known(results, name, cell):
                    _measure_into(results, net, cell)
                if options.json:
                    options.json.write_text(json.dumps(results, indent=1) + "\n")
    accuracy_report.finish(results, options)
    return 0


def _begun(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Results to add to: those of the file, if they were measured in the same way."""
    settings = {name: getattr(options, name) for name in ("text", "count", "rescale", "seed")}
    results = {
        "command": " ".join(["python -m benchmarks accuracy", *arguments]),
        "machine": machine.describe(),
        "settings": settings,
        "rows": [],
        "absent": {},
    }
    if options.json and options.json.exists():
        earlier = json.loads(options.json.read_text())
        if earlier["settings"] != settings:
            raise SystemExit(
                f"{options.json} was measured with {earlier['settings']}, not {settings}"
            )
        results["rows"] = earlier["rows"]
    return results


def _known(results: dict[str, Any], model: str, cell: Cell) -> bool:
    same = {"model": model, **cell._asdict()}
    return any(same.items() <= row.items() for row in results["rows"])


def chosen(words: Iterable[str]) -> list[Cell]:
    """The cells whose label holds one of some words; all of them if there are no words."""
    wanted = [word.lower() for word in words]
    return [c for c in CELLS if not wanted or any(word in c.label.lower() for word in wanted)]


def _measure_into(results: dict[str, Any], net: Net, cell: Cell) -> None:
    started = time.perf_counter()
    try:
        row = measure(net, cell)
    except Exception as error:  # one that fails is told of, the others go on
        results["absent"][f"{net.name}: {cell.label}"] = first_line(error)
        return
    row["wall_seconds"] = time.perf_counter() - started
    results["rows"].append(row)
    print(accuracy_report.line(row), file=sys.stderr, flush=True)


def measure(net: Net, cell: Cell) -> dict[str, Any]:
    """One row: what a cell makes of a model.

    Raises:
        AbsentError: if a package or a method is not there.
    """
    model = copied(net)
    known = net.statistics(cell.calibration) if cell.calibration else None
    started = time.process_time()
    if cell.peer:
        nbytes = _by_peer(model, net, cell, known)
    else:
        _by_us(model, net, cell, known)
    seconds = time.process_time() - started
    found = net.judge(model)
    if not cell.peer:
        nbytes = _codes(model)
    weights = sum(layer.weight.numel() for _, layer in net.layers())
    return {
        "model": net.name,
        **cell._asdict(),
        "bits": 8 * nbytes / weights,
        "bytes": nbytes,
        "seconds": seconds,
        **{name: getattr(found, name) for name in found.__dataclass_fields__},
    }


def _by_us(model: nn.Module, net: Net, cell: Cell, known: Any) -> None:
    rule = quantization.Rule(cell.recipe, cell.method or "rtn")
    report = quantization.quantize_model(model, rule, exclude=net.exclude, statistics=known)
    lost = [layer.name for layer in report if layer.status == "left"]
    if lost:
        raise AbsentError(f"{lost[0]} and {len(lost) - 1} more layers were left in float")


def _codes(model: nn.Module) -> int:
    """Bytes of everything that a quantized layer keeps beside its bias, as a float16 layer.

    Scales of their own type keep it; those that have the layer's are float16 here, as in a model of
    16-bit floats.
    """
    nbytes = 0
    for layer in model.modules():
        if isinstance(layer, quantization.PackedLinearLayer | quantization.QWQALinearLayer):
            parts = layer.half().named_buffers()
            nbytes += sum(part.nbytes for name, part in parts if name != "bias")
    return nbytes


def _by_peer(model: nn.Module, net: Net, cell: Cell, known: Any) -> int:
    """Put a peer's numbers in the place of the weights; the bytes that they would take."""
    total, peer = 0, PEERS[cell.peer]
    modules = dict(model.named_modules())
    for name, layer in net.layers():
        moments = known[name].moments.float() if known else None
        weight, nbytes = peer(layer.weight.detach().clone(), cell.recipe, moments)
        modules[name].weight = nn.Parameter(weight.float(), requires_grad=False)
        total += nbytes
    return total


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks accuracy",
        description="Quantize real models in every way of a table and tell how far they are from "
        "their float selves. Models and texts come as packages, once, into the user's cache.",
    )
    parser.add_argument("--models", type=_names, default=NAMES, help=f"out of {','.join(NAMES)}")
    parser.add_argument("--only", type=_words, default=(), help="words of cells, such as w4,SINQ")
    parser.add_argument("--text", choices=("report", "tune"), default="report")
    parser.add_argument("--count", type=int, default=6, help="windows of 512 tokens to judge by")
    parser.add_argument("--rescale", type=float, default=0.25, help="of the language model")
    parser.add_argument("--seed", type=int, default=0, help="of the rescaling")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--list", action=_List, nargs=0, help="the cells, and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every number; rows that it "
                        "has already are not measured again")  # fmt: skip
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables, put between "
                        "the marks of a page such as docs/accuracy.md")  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="the frontier (matplotlib)")
    parser.add_argument("--read", type=Path, metavar="FILE", help="of --json: tell it again")
    return parser


class _List(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        print(*(f"{cell.label}: {cell.recipe}" for cell in CELLS), sep="\n")
        parser.exit()


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _names(text: str) -> tuple[str, ...]:
    for name in _words(text):
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(NAMES)}")
    return _words(text)
