"""The command line: ``quantization`` or ``python -m quantization``.

    quantization quantize FLOAT-FOLDER NEW-FOLDER --scheme w4g64a
    quantization inspect FOLDER

Without a command the end-to-end suite runs (:mod:`quantization.main`). Exit codes: 0, it was done;
1, it could not be done, and nothing was changed; 2, the call was wrong; 130, interrupted; 141, the
reader of the output went away.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from quantization.console.near import did_you_mean
from quantization.formats import FORMATS
from quantization.ops.extras import need
from quantization.version import VERSION

__all__ = ["COMMANDS", "main"]

#: Commands, and what each does.
COMMANDS = {
    "suite": "the end-to-end suite on a real model, which runs without a command too",
    "quantize": "quantize safetensors files, tensor by tensor, into a new folder",
    "plan": "what quantize would do: every layer, its scheme and bytes",
    "report": "layers of a quantized folder: scheme, method, bytes, codes; errors with --reference",
    "inspect": "what a folder holds: layers, schemes, bytes; or tensors of a float one",
    "explain": "one weight down to the bits of its bytes, or what a byte holds",
    "compare": "a quantized model beside its float one, layer by layer, and what to keep in float",
    "verify": "check a quantized folder to the last byte and code, its kernels with --self-test",
    "export": "write a quantized folder in the format of another library",
    "import": "make a quantized folder of another library's files",
    "bench": "time the layers of a quantized folder beside nn.Linear, on this CPU",
}

_TABLES = ("plan", "report", "inspect", "compare", "verify", "bench")
_EPILOG = """recipes:
  --scheme NAME           for every linear layer: w4g64a (4 bits, groups of 64, asymmetric), w8,
                          w3g128, nf4, mxfp4, kmeans4, binaryg32, ternary, int8, ... +dq, +f16
  --rule PATTERN=NAME     for layers of a name, glob or re:..., the first rule that matches counts;
                          NAME may be 'none' (leave in float)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, or the suite; the exit code.

    Example:
        >>> main(["inspect", "/no/such/folder"])
        1
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    is_suite = arguments[:1] == ["suite"]
    if arguments[:1] == ["--version"]:
        print(f"quantization {VERSION}")
        return 0
    if is_suite or not arguments or arguments[0] not in (*COMMANDS, "-h", "--help"):
        if arguments and not arguments[0].startswith("-") and not is_suite:
            _refuse_command(arguments[0])
        if not _has_torch():
            return 1
        from quantization.demo.suite import main as suite

        return suite(arguments[is_suite:])
    options = _parser().parse_args(arguments)
    if not _has_torch():
        return 1
    from quantization.cli import commands

    try:
        code = commands.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        logging.getLogger("quantization").debug("the command failed", exc_info=True)
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        expected = isinstance(error, _MISTAKES) and str(error)
        said = f"{error}" if expected else f"{type(error).__name__}: {error}"
        flags = commands.flags_of(options)
        print(f"error: {commands.as_flags(said + notes, flags)}", file=sys.stderr)
        return 1


def _has_torch() -> bool:
    try:
        need("torch", "torch")
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    return True


_MISTAKES = (OSError, ValueError, TypeError, ImportError, RuntimeError, MemoryError)


def _refuse_command(name: str) -> None:
    hint = did_you_mean(name, COMMANDS)
    _parser().error(f"there is no command {name!r}; there are {', '.join(COMMANDS)}{hint}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quantization",
        description="Weight quantization for PyTorch.",
    )
    parser.add_argument("--version", action="version", version=f"quantization {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {}
    commands.add_parser("suite", help=COMMANDS["suite"], add_help=False)
    for name, text in COMMANDS.items():
        if name == "suite":  # its options are its own
            continue
        made[name] = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=_EPILOG if name in ("quantize", "plan") else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        forms = made[name].add_mutually_exclusive_group()
        forms.add_argument("--json", action="store_true", help="print one JSON object")
        if name in _TABLES:
            forms.add_argument("--markdown", action="store_true", help="tables as Markdown")
            forms.add_argument("--html", action="store_true", help="tables as HTML, with bars")
    _add_quantize(made["quantize"], made["plan"])
    _add_formats(made["export"], made["import"])
    for name in ("report", "inspect", "verify", "bench"):
        made[name].add_argument("folder", type=Path)
    for name in ("report", "verify"):
        reference = "the folder in float, from which it was quantized"
        made[name].add_argument("--reference", type=Path, metavar="FLOAT", help=reference)
    made["report"].add_argument(
        "--sort", metavar="COLUMN", help="the worst first: sqnr, nbytes, ..."
    )
    kernels = "each instruction set of this CPU against the definition, on these layers"
    made["verify"].add_argument("--self-test", action="store_true", help=kernels)
    made["inspect"].add_argument("--layer", help="one layer: its tensors, first codes and numbers")
    _add_inspection(made["explain"], made["compare"])
    _add_bench(made["bench"])
    return parser


def _add_quantize(quantize: argparse.ArgumentParser, plan: argparse.ArgumentParser) -> None:
    for parser in (quantize, plan):
        parser.add_argument("source", type=Path, help="safetensors folder or file, in float")
        if parser is quantize:
            parser.add_argument("destination", type=Path, help="folder to write")
        add = parser.add_argument
        add("--scheme", help="of every linear layer that no rule names")
        add("--rule", action="append", default=[], metavar="PATTERN=NAME", help="repeatable")
        add("--exclude", action="append", default=[], metavar="PATTERN", help="leave in float")
        nonfinite = "what a NaN or infinity does: an error, or NaN for its group (default: raise)"
        add("--nonfinite", choices=("raise", "mark"), default="raise", help=nonfinite)
        method = "how codes are found where no scheme says it (w4g32a:lsq): rtn, lsq, descent, ..."
        add("--method", metavar="NAME", help=method)
        known = "for methods: self (text that the model writes), random (token ids), or a file of "
        add(
            "--calibrate", metavar="WHAT", help=known + "save_statistics; the model is run in float"
        )
        unfuse = "quantize fused experts (mixtures) too, each as layers of its own"
        add("--unfuse-experts", action="store_true", help=unfuse)
    add = quantize.add_argument
    add("--dry-run", action="store_true", help="print the plan, write nothing")
    add("--overwrite", action="store_true", help="replace the destination once all is written")
    add("--restart", action="store_true", help="throw away what a killed run finished")
    add("--workers", type=_positive, default=1, help="processes on this machine (default: 1)")
    add("--shard-bytes", type=_positive, help="begin files anew beyond so many bytes")


def _add_formats(export: argparse.ArgumentParser, imports: argparse.ArgumentParser) -> None:
    rows = FORMATS.items()
    there = [name for name, (_, _, can_write) in rows if can_write]
    here = [name for name, (_, can_read, _) in rows if can_read]
    for parser, names in ((export, there), (imports, here)):
        parser.add_argument("source", type=Path)
        parser.add_argument("destination", type=Path)
        parser.add_argument("--format", required=True, metavar="NAME", help=", ".join(names))
        parser.add_argument("--overwrite", action="store_true", help="replace the destination")
        parser.add_argument("--dry-run", action="store_true", help="read and check, write nothing")
        plain = "gguf: tensors by their own names, of no architecture"
        parser.add_argument("--plain", action="store_true", help=plain)
    rounding = "gguf: where a type cannot hold a number of a scheme, round it and say so"
    export.add_argument("--allow-rounding", action="store_true", help=rounding)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    tokens = "rows of activations (default: 1,16,128)"
    parser.add_argument("--tokens", type=_numbers, default=[1, 16, 128], help=tokens)
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="of activations (default: the layer's)")
    parser.add_argument("--threads", type=_positive, help="default: torch's")


def _add_inspection(explain: argparse.ArgumentParser, compare: argparse.ArgumentParser) -> None:
    add = explain.add_argument
    add("folder", type=Path, help="a quantized folder")
    add("layer", help="its dotted name")
    add("place", type=int, nargs="*", metavar="ROW COL", help="of the weight")
    add("--reference", type=Path, help="float folder: where its weight lies among the levels")
    add("--byte", type=int, metavar="N", help="what byte N of a buffer holds, in place of a weight")
    add("--buffer", default="codes", help="codes, scales, zero_points, ... (default: codes)")
    add = compare.add_argument
    add("folder", type=Path, help="a quantized folder")
    add("reference", type=Path, help="the float folder, with a config.json of transformers")
    add("--inputs", choices=("random", "self"), default="random",
        help="random token ids (default), or text that the float model writes")  # fmt: skip
    add("--tokens", type=_shape, default=(4, 128), metavar="4x128", help="sequences x tokens")
    add("--seed", type=int, default=0)
    columns = ("sqnr", "own_sqnr", "inherited_sqnr", "cosine", "own_share")
    add("--sort", choices=columns, help="the least first (default: as the layers run)")
    alone = "for --keep: measure first what each layer alone loses, one run a layer"
    add("--measure", action="store_true", help=alone)
    add("--keep", type=float, metavar="DIVERGENCE", help="which layers to leave in float for that")


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _shape(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not SEQUENCESxTOKENS, such as 4x128")
    return int(parts[0]), int(parts[1])
