"""A quantized folder looked at: one weight down to its bits, or layers beside the float ones."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from quantization import checkpoint
from quantization.calibration.calls import observed
from quantization.calibration.inputs import made_up
from quantization.checkpoint.disk.safetensors_files import TensorFolder
from quantization.checkpoint.disk.stored_tensor import key_of
from quantization.checkpoint.source.skeleton import skeleton_of_config
from quantization.checkpoint.stored_model import StoredLayer, StoredModel
from quantization.cli.output import Output
from quantization.console.near import did_you_mean
from quantization.console.progress import progress
from quantization.inspection.comparison.compare import compare as compare_models
from quantization.inspection.explain import explain as explain_weight
from quantization.inspection.explain_byte import explain_byte

__all__ = ["compare", "explain", "layer_of"]


def layer_of(stored: StoredModel, name: str) -> StoredLayer:
    """A layer of a folder by its name.

    Raises:
        ValueError: if there is none; the message has some that there are.
    """
    if name not in stored.layers:
        some = ", ".join(list(stored.layers)[:5])
        raise ValueError(
            f"no layer {name!r}; there are {some}, ...{did_you_mean(name, stored.layers)}"
        )
    return stored.layers[name]


def explain(options: argparse.Namespace, out: Output) -> dict[str, Any]:
    """``quantization explain``: a weight, or a byte."""
    layer = layer_of(checkpoint.read_checkpoint(options.folder), options.layer)
    if options.byte is not None:
        if options.place or options.reference:
            raise ValueError("--byte stands for itself: leave ROW, COL and --reference out")
        byte = explain_byte(layer, options.byte, options.buffer)
        out.line(str(byte))
        return {"layer": options.layer, "buffer": byte.buffer, "byte": byte.offset,
                "value": byte.value, "held": [_plain(held) for held in byte.held]}  # fmt: skip
    if len(options.place) != 2:
        raise ValueError("say which weight: explain FOLDER LAYER ROW COL, or a byte: --byte N")
    row, col = options.place
    reference = _weight(options, layer)
    told = explain_weight(layer, row, col, reference=reference)
    out.line(str(told))
    return {"layer": options.layer, **told.to_dict()}


def _weight(options: argparse.Namespace, layer: StoredLayer) -> torch.Tensor | None:
    """The layer's weight in the float folder, if one is given."""
    if options.reference is None:
        return None
    key = key_of(options.layer, "weight")
    stored = TensorFolder(options.reference).tensors().get(key)
    if stored is None:
        raise ValueError(f"{options.reference} has no tensor {key}")
    weight = stored.load()
    return weight.T if "was_conv1d" in layer.more else weight


def _plain(held: Any) -> dict[str, Any]:
    rows, cols = list(held.rows), list(held.cols)
    return {"what": held.what, "rows": rows, "cols": cols, "mask": held.mask, "bits": held.words}


def compare(options: argparse.Namespace, out: Output) -> dict[str, Any]:
    """``quantization compare``: a table of layers, and which to keep."""
    kind: Any = type(skeleton_of_config(options.reference))
    reference = kind.from_pretrained(options.reference).eval()
    model = checkpoint.load_quantized(options.folder)
    sequences, tokens = options.tokens
    wanted = "self" if options.inputs == "self" else "random"
    with observed(reference):
        made = made_up(reference, wanted, (sequences, tokens), options.seed, hessian=False)
    both = compare_models(model, reference)
    batches = made.batches(reference)
    with both, progress("compare") as show:
        for done, batch in enumerate(batches, start=1):
            both(batch)
            show(done, len(batches))
    out.table(both if options.sort is None else both.sort(options.sort))
    result: dict[str, Any] = {"inputs": made.source, "layers": both.to_records()}
    result |= {"divergence": vars(both.divergence)}
    if options.keep is not None:
        kept = both.keep(options.keep, measured=options.measure)
        rules = " ".join(f"--rule '{pattern}=none'" for pattern in kept)
        out.line(f"to keep to {options.keep:g}: {rules or 'nothing stays in float'}")
        result |= {"keep": list(kept.layers), "kept_divergence": vars(kept.measured)}
    return result
