"""The end-to-end suite: a real model, quantized, measured before and after, every claim checked.

    python -m quantization                     the embedded model; numpy and torch alone, seconds
    python -m quantization --model smollm2     a 135 M-parameter chat model; needs the extra [demo]

The exit code is 0 when every check held, 1 when one did not, 2 for a wrong call.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from itertools import takewhile
from pathlib import Path

import numpy
import torch
from torch import nn

from quantization.console.progress import progress
from quantization.demo import char_model, quality, weight_checks
from quantization.demo.model_download import WHEEL_MODELS
from quantization.demo.model_sources import LoadedModel, ModelError, load_model
from quantization.demo.suite_log import SuiteLog
from quantization.layers.int8_layer import QWQALinearLayer
from quantization.ops.runtime import active_isa, isas
from quantization.swap.patterns import match_patterns
from quantization.swap.replacement import Target, replace_linear_layers_with_w8a16
from quantization.swap.walker import walk
from quantization.version import VERSION

MEMORY_BOUND = 0.27
SAMPLE = 10  # layers that modes and granularities are compared on
QUICK_TOKENS = 8192
DEFAULT_TOKENS = {"characters": 25_000}  # seconds, on the reference kernels too; others read all
PROMPTS = {"characters": "And God said", "causal": "Once upon a time, there was a"}
LENGTHS = {"characters": 120, "causal": 32}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Example:
        >>> parse_arguments(["--model", "minilm"]).model
        'minilm'
    """
    parser = argparse.ArgumentParser(
        prog="python -m quantization",
        description=(
            "Quantize a real model and check the result. Without arguments: the embedded "
            "character model, under 30 seconds on 2 cores. smollm2 takes about 5 minutes on 2 "
            "cores (--quick: about 1)."
        ),
    )
    names = ", ".join(WHEEL_MODELS)
    parser.add_argument(
        "--model", help=f"{names}, a transformers folder, a GGUF file or a hub name"
    )
    _add_text_options(parser)
    _add_run_options(parser)
    return parser.parse_args(arguments)


def _add_text_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "text to measure on (default: 200 000 bytes of the King James Bible)"
    add("--text", type=Path, default=char_model.HELD_OUT_TEXT, help=text)
    limit = f"{DEFAULT_TOKENS['characters']} for the embedded model, else all"
    add("--tokens", type=_positive, help=f"most tokens of the text to read (default: {limit})")
    quick = f"the same as --tokens {QUICK_TOKENS}, and a shorter continuation"
    add("--quick", action="store_true", help=quick)
    add("--prompt", help="start of the continuation that is printed before and after")
    add("--length", type=_positive, help="tokens of the continuation")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    exclude = "leave these layers float too: name, dotted name, glob or re:pattern (repeatable)"
    add("--exclude", action="append", default=[], metavar="PATTERN", help=exclude)
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the activations")
    add("--threads", type=_positive, help="threads to compute with (default: torch's)")
    add("--json", action="store_true", help="print one JSON object; the talk goes to stderr")


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def describe_machine(log: SuiteLog) -> None:
    """Say what computes: versions, threads, instruction sets."""
    log.stage("machine")
    available, active = isas(), active_isa()
    log.line(
        f"  quantization {VERSION}, torch {torch.__version__}, numpy "
        f"{numpy.__version__}, Python {platform.python_version()}, {platform.machine()}"
    )
    log.line(f"  kernels: {active} is active; this CPU runs {', '.join(available)}")
    log.line(f"  threads: {torch.get_num_threads()}")
    log.figures["machine"] = {
        "isas": list(available),
        "active_isa": active,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def linear_layers(model: nn.Module, exclude: list[str]) -> dict[str, nn.Module]:
    """The layers of a model that are to be replaced, by name.

    Example:
        >>> list(linear_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ["2"]))
        ['0']
    """
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or type(module).__name__ == "Conv1D") and name not in exclude
    }


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The layer's weight as [out_features, in_features]; transformers' Conv1D keeps it turned."""
    weight = layer.weight.detach()
    return weight if isinstance(layer, nn.Linear) else weight.T.contiguous()


def describe_model(log: SuiteLog, loaded: LoadedModel, linears: dict[str, nn.Module]) -> None:
    """Say what was loaded."""
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    inside = sum(layer.weight.numel() for layer in linears.values())
    log.line(f"  {loaded.source}")
    log.line(
        f"  {count:,} parameters; {len(linears)} Linear layers to replace hold {inside:,} weights"
    )
    log.figures["model"] = {"name": loaded.name, "parameters": count, "weights": inside}


def check_call(loaded: LoadedModel, floats: dict[str, nn.Module], exclude: list[str]) -> None:
    """Find a wrong call before minutes of work.

    Raises:
        ModelError: there is nothing to replace, or a pattern matches nothing.
    """
    if not floats:
        raise ModelError(f"{loaded.name} has no Linear layer to replace")
    try:
        match_patterns(list(walk(loaded.model)), exclude)
    except ValueError as error:
        raise ModelError(str(error)) from error


def compare_weights(log: SuiteLog, linears: dict[str, nn.Module]) -> None:
    """Modes and granularities on the model's own weights; agreement of kernels; packing."""
    names = list(linears)
    count = min(SAMPLE, len(names))
    sample = [names[index * len(names) // count] for index in range(count)]
    weights = [weight_of(linears[name]).float() for name in sample]
    log.stage(f"modes and granularities on {len(weights)} of the {len(names)} layers")
    errors = weight_checks.compare_choices(weights)
    labels = list(weight_checks.GRANULARITIES)
    rows: dict[str, list[str]] = {}
    for error in errors:
        row = rows.setdefault(f"{error.code} {error.mode.lower()}", [])
        row.append(f"{100 * error.relative_rms:.2f} %  {error.bytes_per_weight:.3f}")
    log.line("  relative RMS error and bytes per weight, one scale a ...")
    log.table(["codes", *labels], [[name, *cells] for name, cells in rows.items()])
    log.figures["errors"] = [vars(error) for error in errors]
    worst = max(error.worst_in_steps for error in errors if error.has_half_step_bound)
    log.at_most("largest error of an integer code, in steps", worst, 0.5001)
    by_row = next(e for e in errors if (e.code, e.granularity) == ("int8", "row"))
    log.at_most("relative RMS error of int8 a row", by_row.relative_rms, 0.02)
    compare_kernels(log, weights[0])
    round_trip(log, sample[0], weights[0])


def compare_kernels(log: SuiteLog, weight: torch.Tensor) -> None:
    """One layer through torch's expression, the NumPy core and every instruction set."""
    log.stage("the same numbers whoever computes")
    same = weight_checks.equals_torch_expression(weight)
    log.true("int8 codes equal the torch expression bit for bit", same)
    log.true("ndarrays get the same codes as tensors", weight_checks.equals_numpy(weight))
    for isa in isas():
        same, share = weight_checks.isa_disagreement(weight, isa)
        log.true(f"{isa}: same codes", same)
        log.at_most(f"{isa}: linear, error as a share of the float64 bound", share, 1.0)


def round_trip(log: SuiteLog, name: str, weight: torch.Tensor) -> None:
    """Pack the codes of one layer at each width and take them out again."""
    log.stage(f"packed bytes of {name}, there and back")
    for bits, layout in ((2, "aligned"), (4, "aligned"), (3, "dense"), (8, "dense")):
        codes, packed, back = weight_checks.packed_round_trip(weight, bits, layout)
        first = packed.flatten()[:6].numpy().tobytes().hex(" ")
        detail = f"{codes.numel():,} codes, {packed.nbytes:,} bytes: {first} ..."
        log.true(f"{bits}-bit codes, {layout}, come back exactly", torch.equal(codes, back), detail)


def replace_layers(log: SuiteLog, loaded: LoadedModel, exclude: list[str]) -> None:
    """Swap the layers and check the memory they take."""
    log.stage("replacing the layers")
    target = Target.Linear(QWQALinearLayer)
    report = replace_linear_layers_with_w8a16(loaded.model, target, exclude)
    log.line("  " + str(report).replace("\n", "\n  "))
    layers = [m for m in loaded.model.modules() if isinstance(m, QWQALinearLayer)]
    now = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    full = sum(
        4 * layer.int8_weights.numel() + (0 if layer.bias is None else 4 * layer.bias.numel())
        for layer in layers
    )
    log.line(f"  the replaced layers took {full:,} bytes in float32 and take {now:,}")
    log.figures["memory"] = {"float32": full, "w8a16": now}
    log.figures["replaced"] = len(layers)
    log.true("layers were replaced", bool(layers), f"{len(layers)}")
    log.at_most("memory of the replaced layers, share of float32", now / max(full, 1), MEMORY_BOUND)


def measure(
    log: SuiteLog, judge: quality.Judge, loaded: LoadedModel, settings: argparse.Namespace
) -> tuple[quality.Measured, dict]:
    """Quality, continuation and speed of the model as it now is."""
    with progress(f"  {judge.unit}") as show:
        measured = judge.measure(loaded.model, show)
    rate = measured.tokens / measured.seconds
    if measured.figure is not None:
        log.line(f"  {judge.unit}: {measured.figure:.4f}")
    log.line(
        f"  reading: {measured.tokens:,} {judge.token}s in {measured.seconds:.1f} s, "
        f"{rate:,.0f} a second"
    )
    figures = {"figure": measured.figure, "read_per_second": rate}
    if judge.continue_prompt is not None:
        prompt = settings.prompt or PROMPTS[loaded.kind]
        length = settings.length or LENGTHS[loaded.kind] // (4 if settings.quick else 1)
        started = time.perf_counter()
        text = judge.continue_prompt(loaded.model, prompt, length)
        seconds = time.perf_counter() - started
        log.line(f"  writing: {length} {judge.token}s, {length / seconds:.1f} a second")
        log.line("  | " + (prompt + text).replace("\n", "\n  | "))
        figures |= {"continuation": text, "written_per_second": length / seconds}
    return measured, figures


def compare_speed(log: SuiteLog, loaded: LoadedModel, floats: dict[str, nn.Module]) -> None:
    """Time the float layers and those in their places, turn by turn."""
    now = dict(loaded.model.named_modules())
    names = [name for name in floats if isinstance(now[name], QWQALinearLayer)]
    dtype = now[names[0]].scales.dtype
    log.stage("speed of the replaced layers alone, all once, best of 5")
    for tokens in (1, 8, 128):
        times = [
            quality.time_linear([(layers[n], now[n].in_features) for n in names], tokens, dtype)
            for layers in (floats, now)
        ]
        log.line(
            f"  {tokens:4} tokens: {1e3 * times[0]:9.2f} ms float, {1e3 * times[1]:9.2f} ms W8A16: "
            f"{times[0] / times[1]:.2f} times as fast"
        )
        log.figures.setdefault("layer_seconds", {})[tokens] = times


def read_text(path: Path) -> str:
    """The text to measure on.

    Raises:
        ModelError: it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read the text {path}: {error}; give UTF-8 text") from error


def compare_quality(
    log: SuiteLog,
    loaded: LoadedModel,
    floats: dict[str, nn.Module],
    text: str,
    settings: argparse.Namespace,
) -> None:
    """Measure, replace, measure again, judge."""
    limit = settings.tokens or (QUICK_TOKENS if settings.quick else DEFAULT_TOKENS.get(loaded.kind))
    judge = quality.judge_for(loaded, text, limit)
    log.stage(f"before: {settings.dtype}")
    log.line(
        f"  text: {settings.text.name}, {judge.covered:,} of {len(text.encode()):,} bytes are read"
    )
    before, figures = measure(log, judge, loaded, settings)
    log.figures["before"] = figures
    replace_layers(log, loaded, [*loaded.exclude, *settings.exclude])
    log.stage(f"after: int8 weights, {settings.dtype} activations")
    after, log.figures["after"] = measure(log, judge, loaded, settings)
    change = judge.change(before, after)
    log.at_most(change.name, change.value, change.bound)
    if change.error is not None:
        log.line(f"  standard error of that change over so many tokens: {change.error:.2g}")
    if "continuation" in figures:
        pairs = zip(figures["continuation"], log.figures["after"]["continuation"], strict=False)
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        log.line(f"  the continuations agree in their first {same} characters")
    compare_speed(log, loaded, floats)


def run(settings: argparse.Namespace, log: SuiteLog) -> None:
    """The whole suite."""
    if settings.threads:
        torch.set_num_threads(settings.threads)  # the kernels follow torch
    text = read_text(settings.text)
    describe_machine(log)
    if active_isa() == "reference" and not settings.quick:
        settings.quick = True
        log.line("  the reference kernels define the results and are slow: --quick is taken")
    log.stage("model")
    loaded = load_model(settings.model, getattr(torch, settings.dtype))
    floats = linear_layers(loaded.model, loaded.exclude)
    describe_model(log, loaded, floats)
    check_call(loaded, floats, settings.exclude)
    compare_weights(log, floats)
    compare_quality(log, loaded, floats, text, settings)


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; the exit code.

    Example:
        >>> main(["--text", "/no/such/text"])
        2
    """
    settings = parse_arguments(arguments)
    log = SuiteLog(sys.stderr if settings.json else sys.stdout)
    started = time.monotonic()
    try:
        run(settings, log)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    seconds = time.monotonic() - started
    held = len(log.checks) - len(log.failed)
    log.line(f"\n{held} of {len(log.checks)} checks held, {seconds:.0f} s")
    for name in log.failed:
        log.line(f"  FAILED: {name}")
    if settings.json:
        print(json.dumps(log.figures | {"checks": log.checks, "seconds": seconds}))
    return 1 if log.failed else 0
