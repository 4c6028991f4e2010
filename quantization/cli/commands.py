"""What each command does."""

from __future__ import annotations

import argparse
import inspect
import tempfile
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from quantization import checkpoint
from quantization.checkpoint.disk.safetensors_files import TensorFolder
from quantization.checkpoint.disk.stored_tensor import nbytes_of
from quantization.checkpoint.format import FILE
from quantization.checkpoint.source.float_source import open_source
from quantization.checkpoint.stored_model import StoredLayer, StoredModel
from quantization.cli import inspection
from quantization.cli.bench import bench_layers
from quantization.cli.calibration import statistics_of, with_method
from quantization.cli.output import Output, as_flags
from quantization.console.columns import Column, size
from quantization.console.progress import progress
from quantization.console.table import Table, table_of
from quantization.formats import FormatError, reader, writer
from quantization.formats.gguf import save_tokenizer
from quantization.inspection.checking.self_test import self_test
from quantization.inspection.checking.verify import verify
from quantization.inspection.report import report
from quantization.swap.report import COLUMNS, Candidate, ReplacementReport, joined

__all__ = ["as_flags", "flags_of", "run"]


def run(options: argparse.Namespace) -> int:
    """Do what the command line asks for; the exit code."""
    forms = ("json", "markdown", "html")
    form = next((form for form in forms if getattr(options, form, False)), "text")
    out = Output(form, flags_of(options))
    result = _RUNNERS[options.command](options, out)
    out.finish(result)
    return 0 if result.get("ok", True) else 1


def flags_of(options: argparse.Namespace) -> Collection[str]:
    """The options of a command, by their names in Python."""
    return vars(options).keys()


# ---- quantize, plan --------------------------------------------------------------------------


def _recipe(options: argparse.Namespace) -> dict[str, str | None] | str:
    rules: dict[str, str | None] = {}
    for rule in options.rule:
        pattern, sign, name = rule.rpartition("=")
        if not sign or not pattern or not name:
            raise ValueError(f"a rule is PATTERN=NAME, not {rule!r}")
        if pattern in rules or (pattern == "*" and options.scheme):
            raise ValueError(f"two schemes are given for the pattern {pattern!r}")
        rules[pattern] = with_method(None if name == "none" else name, options.method)
    if not rules and not options.scheme:
        raise ValueError("say what to make: --scheme w4g64a, or --rule PATTERN=NAME")
    scheme = with_method(options.scheme, options.method)
    if not rules:
        return scheme
    return rules | ({"*": scheme} if scheme else {})


def _refuse_gguf(source: Path) -> None:
    """Files of GGUF hold quantized tensors; they have a way of their own."""
    files = sorted(source.glob("*")) if source.is_dir() else [source]
    found = [file for file in files if file.suffix.lower() == ".gguf"]
    others = [file for file in files if file.suffix == ".safetensors"]
    if found and not others:
        raise ValueError(
            f"{found[0]} is a GGUF file, which is quantized by itself: "
            f"quantization import {found[0]} NEW-FOLDER --format gguf"
        )


def _quantize(options: argparse.Namespace, out: Output) -> dict[str, Any]:
    _refuse_gguf(options.source)
    if options.dry_run:
        return _plan(options, out)
    recipe = _recipe(options)
    given = {"shard_bytes": "max_shard_bytes"}
    more = {given[name]: value for name in given if (value := getattr(options, name))}
    statistics = statistics_of(options, recipe)
    with progress("quantize", "B") as show:
        report = checkpoint.quantize_checkpoint(
            options.source,
            options.destination,
            recipe,
            statistics=statistics,
            exclude=options.exclude,
            nonfinite=options.nonfinite,
            unfuse_experts=options.unfuse_experts,
            overwrite=options.overwrite,
            restart=options.restart,
            workers=options.workers,
            progress=show,
            **more,
        )
    out.table(report)
    out.line(f"written: {options.destination}")
    return _plain(report) | {"destination": str(options.destination)}


def _plan(options: argparse.Namespace, out: Output) -> dict[str, Any]:
    _refuse_gguf(options.source)
    source = open_source(
        options.source,
        _recipe(options),
        exclude=options.exclude,
        nonfinite=options.nonfinite,
        unfuse_experts=options.unfuse_experts,
        planned=True,
    )
    assert source.plan is not None
    out.table(source.plan)
    for key in source.dropped:
        out.line(f"left out, as the model has no place for it: {key}")
    more = {"parameters": source.plan.to_records(), "dropped": list(source.dropped)}
    return _plain(source.report) | more


def _plain(report: ReplacementReport) -> dict[str, Any]:
    return {
        "layers": [
            {
                "name": candidate.name,
                "status": candidate.status,
                "reason": candidate.reason,
                "shape": candidate.shape,
                "scheme": candidate.scheme,
                "bits_per_weight": candidate.bits_per_weight,
                "bytes_before": candidate.bytes_before,
                "bytes_after": candidate.bytes_after,
            }
            for candidate in report
        ],
        "bytes_before": report.model_bytes_before,
        "bytes_after": report.model_bytes_after,
        "coverage": report.coverage,
    }


# ---- inspect, verify -------------------------------------------------------------------------

_TENSORS = ("tensor", "dtype", "shape", Column("bytes", "bytes"))


def _inspect(options: argparse.Namespace, out: Output) -> dict[str, Any]:
    if not (options.folder / FILE).is_file():
        if options.layer is not None:
            raise ValueError(f"{options.folder} has no {FILE}: --layer is of a quantized folder")
        return _inspect_float(options, out)
    stored = checkpoint.read_checkpoint(options.folder)
    if options.layer is not None:
        return _inspect_layer(stored, options.layer, out)
    candidates = [_candidate(name, layer) for name, layer in stored.layers.items()]
    floats = {key: t for key, t in stored.tensors.items() if key not in stored.ties}
    packed = sum(c.bytes_after for c in candidates)
    others = sum(nbytes_of(tensor.dtype, tensor.shape) for tensor in floats.values())
    out.table(Table(COLUMNS, joined(candidates)))
    out.line(
        f"{len(candidates)} quantized layers of {size(packed)} (in float: "
        f"{size(sum(c.bytes_before for c in candidates))}), {len(floats)} other tensors of "
        f"{size(others)}, {len(stored.ties)} tied"
    )
    return {
        "layers": {
            c.name: {
                "kind": c.kind, "scheme": c.scheme, "shape": c.shape, "bytes": c.bytes_after,
                "bits_per_weight": c.bits_per_weight,
            }
            for c in candidates
        },
        "tensors": {key: {"dtype": t.dtype, "shape": t.shape} for key, t in floats.items()},
        "ties": dict(stored.ties),
    }  # fmt: skip


def _candidate(name: str, layer: StoredLayer) -> Candidate:
    nbytes, dtype = layer.scheme.nbytes(layer.shape, layer.dtype), layer.dtype
    bits = layer.scheme.bits_per_weight(layer.shape, dtype)
    return Candidate(
        name, layer.kind, "", layer.kind, layer.shape, nbytes_of(dtype, layer.shape), nbytes,
        scheme=str(layer.scheme), bits_per_weight=bits,
    )  # fmt: skip


def _inspect_layer(stored: StoredModel, name: str, out: Output) -> dict[str, Any]:
    layer = inspection.layer_of(stored, name)
    module = layer.module()
    weight = module.weight
    row = weight[0, :8].tolist() if weight.numel() else []
    parts = {key: t for key, t in module.named_buffers() if t is not None}
    out.line(f"{name}: {layer.kind}, {layer.scheme!r}, {layer.shape}, {layer.dtype}")
    rows = [(key, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.nbytes)
            for key, t in parts.items()]  # fmt: skip
    out.table(table_of(_TENSORS, rows))
    out.line(f"first numbers of row 0: {', '.join(f'{value:.6g}' for value in row)}")
    return {
        "name": name,
        "scheme": layer.scheme.to_dict(),
        "tensors": {key: {"dtype": dtype, "shape": shape} for key, dtype, shape, _ in rows},
        "first_numbers": row,
    }


def _inspect_float(options: argparse.Namespace, out: Output) -> dict[str, Any]:
    files = TensorFolder(options.folder)
    entries = {key: files.entry(key) for key in files.file_of}
    total = sum(entry.stop - entry.start for entry in entries.values())
    rows = [(key, e.dtype, tuple(e.shape), e.stop - e.start) for key, e in entries.items()]
    out.table(table_of(_TENSORS, rows))
    out.line(f"{len(entries)} tensors of {size(total)} in {len(files.files)} files, not quantized")
    return {"tensors": {key: {"dtype": e.dtype, "shape": e.shape} for key, e in entries.items()}}


def _report(options: argparse.Namespace, out: Output) -> dict[str, Any]:
    with progress("report") as show:
        found = report(options.folder, options.reference, progress=show)
    if options.sort:
        found = found.sort(options.sort, reverse=options.sort in ("nbytes", "bytes"))
    out.table(found)
    return {"folder": str(options.folder), "layers": found.to_records()}


def _verify(options: argparse.Namespace, out: Output) -> dict[str, Any]:
    nbytes = checkpoint.verify_checkpoint(options.folder)
    out.line(f"{options.folder}: {size(nbytes)} of tensors, all as they were written")
    result: dict[str, Any] = {"folder": str(options.folder), "bytes": nbytes, "ok": True}
    with progress("verify") as show:
        checks = [verify(options.folder, options.reference, progress=show)]
        if options.self_test:
            checks.append(self_test(options.folder, progress=show))
    for found in checks:
        out.table(found)
        result[found.title.replace(" ", "_")] = found.to_records()
        result["ok"] = result["ok"] and found.ok
    return result


# ---- formats, bench --------------------------------------------------------------------------


def _export(options: argparse.Namespace, out: Output) -> dict[str, Any]:
    write = _with_options(writer(options.format), options, "plain", "allow_rounding")
    stored = checkpoint.read_checkpoint(options.source)
    return _convert(stored, write, options, out)


def _import(options: argparse.Namespace, out: Output) -> dict[str, Any]:
    stored = _with_options(reader(options.format), options, "plain")(options.source)
    with tempfile.TemporaryDirectory() as place:
        if options.format == "gguf" and not options.dry_run:
            stored = replace(stored, assets=_tokenizer(options.source, Path(place), out))
        return _convert(stored, checkpoint.write_checkpoint, options, out)


def _with_options(
    call: Callable[..., Any], options: argparse.Namespace, *names: str
) -> Callable[..., Any]:
    """The reader or writer of a format with those of its own options that are set."""
    chosen = {name: True for name in names if getattr(options, name)}
    for name in chosen:
        if name not in inspect.signature(call).parameters:
            raise ValueError(
                f"the format {options.format} has no option --{name.replace('_', '-')}"
            )
    return partial(call, **chosen)


def _tokenizer(source: Path, place: Path, out: Output) -> tuple[Path, ...]:
    """The files of the tokenizer in a GGUF file, where transformers can make them."""
    try:
        save_tokenizer(source, place)
    except (ImportError, FormatError) as error:
        out.line(f"without a tokenizer: {error}")
    return tuple(sorted(path for path in place.iterdir() if path.is_file()))


def _convert(
    stored: StoredModel, write: Callable[..., Any], options: argparse.Namespace, out: Output
) -> dict[str, Any]:
    what = f"{len(stored.layers)} quantized layers, {len(stored.tensors)} other tensors"
    if options.dry_run:
        out.line(f"{options.source}: {what}; nothing was written")
    else:
        write(stored, options.destination, overwrite=options.overwrite)
        out.line(f"{options.destination}: {what}")
    return {"layers": len(stored.layers), "tensors": len(stored.tensors)}


def _bench(options: argparse.Namespace, out: Output) -> dict[str, Any]:
    stored = checkpoint.read_checkpoint(options.folder)
    rows = bench_layers(stored, options.tokens, options.dtype, options.threads)
    head = ("layer", "scheme", "tokens", "ms", "nn.Linear ms", "faster", Column("kernel"))
    cells = [
        (f"{r['shape'][0]} x {r['shape'][1]} ({r['layers']}x)", r["scheme"], r["tokens"],
         f"{r['ms']:.3g}", f"{r['linear_ms']:.3g}", f"{r['linear_ms'] / r['ms']:.2f}x",
         r["kernel"])
        for r in rows
    ]  # fmt: skip
    out.table(table_of(head, cells))
    return {"rows": rows}


_RUNNERS: dict[str, Callable[[argparse.Namespace, Output], dict[str, Any]]] = {
    "quantize": _quantize,
    "plan": _plan,
    "report": _report,
    "inspect": _inspect,
    "explain": inspection.explain,
    "compare": inspection.compare,
    "verify": _verify,
    "export": _export,
    "import": _import,
    "bench": _bench,
}
