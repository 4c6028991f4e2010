"""Time the layers of a checkpoint beside nn.Linear of the same shape and dtype, turn by turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from quantization.checkpoint.stored_model import StoredLayer, StoredModel

__all__ = ["bench_layers"]

_SECONDS = 0.3  # of a pair
_LEAST = 5  # samples


def bench_layers(
    stored: StoredModel,
    tokens: Sequence[int],
    dtype: str | None = None,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """A row for each shape and scheme among the linear layers, and each number of tokens.

    Args:
        stored: the model.
        tokens: rows of activations.
        dtype: of activations and of nn.Linear, by name; None: that of the layer.
        threads: torch's threads while it runs; None: as they are.

    Returns:
        Rows with medians in milliseconds, the kernel, and how many layers are alike.

    Example:
        >>> from quantization import QWQALinearLayer
        >>> from quantization.checkpoint.stored_model import stored_model
        >>> bench_layers(stored_model(QWQALinearLayer(64, 32)), [1])[0]["shape"]
        (32, 64)
    """
    before = torch.get_num_threads()
    alike: dict[Any, list[StoredLayer]] = {}
    for layer in stored.layers.values():
        if layer.kind != "embedding" and 0 not in layer.shape:
            alike.setdefault((layer.kind, layer.scheme, layer.shape, layer.dtype), []).append(layer)
    try:
        torch.set_num_threads(threads or before)
        return [
            _row(layers[0], len(layers), count, dtype or layers[0].dtype)
            for layers in alike.values()
            for count in tokens
        ]
    finally:
        torch.set_num_threads(before)


def _row(layer: StoredLayer, alike: int, tokens: int, dtype: str) -> dict[str, Any]:
    rows, cols = layer.shape
    kind = getattr(torch, dtype)
    ours: Any = layer.module()
    theirs = nn.Linear(cols, rows, bias=False, dtype=kind)
    x = torch.randn(tokens, cols, dtype=kind)
    with torch.inference_mode():
        mine, linear = _medians(lambda: ours(x), lambda: theirs(x))
    return {
        "shape": layer.shape,
        "scheme": str(layer.scheme),
        "layers": alike,
        "tokens": tokens,
        "ms": mine,
        "linear_ms": linear,
        "kernel": str(ours.kernel(tokens, kind)),
    }


def _medians(*calls: Callable[[], Any]) -> list[float]:
    """Milliseconds of each, by turns."""
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end or len(samples[0]) < _LEAST:
        for call, times in zip(calls, samples, strict=True):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return [median(times) for times in samples]
