"""A row of layers in a process of its own, whose weights are cold at each call.

A program: it reads a request a line from stdin and answers with a line on stdout, both JSON, with
the package that stands first on its path, so that two builds can take turns. It knows nothing of
the other benchmarks, and uses of the package what older builds have as well.

Requests: ``{"build": row, "name": name}`` makes layers, ``{"time": name}`` passes over them once,
``{"forget": true}`` gives the memory of all back.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import nn

import quantization


def make(row: dict[str, Any]) -> tuple[nn.Sequential, torch.Tensor]:
    """Layers of the same shape, each with a weight of its own, and an input of one token.

    Args:
        row: ``shape`` (out, in), ``count`` of layers, ``scheme`` ("float": as they are), ``dtype``,
            ``threads`` and ``isa``.
    """
    torch.set_num_threads(row["threads"])
    quantization.set_isa(row["isa"])
    (out_features, in_features), dtype = row["shape"], getattr(torch, row["dtype"])
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features, dtype=dtype) / in_features**0.5
    layers = nn.Sequential()
    for _ in range(row["count"]):
        layer = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=dtype)
        layer.weight = nn.Parameter(weight.clone())
        layers.append(layer)
    if row["scheme"] != "float":
        quantization.quantize_model(layers, row["scheme"])
    return layers.eval(), torch.randn(1, in_features).to(dtype)


def described(layers: nn.Sequential) -> dict[str, Any]:
    """Bytes and weights of all layers, and which pages they lie on where the package tells."""
    tensors = [*layers.parameters(), *layers.buffers()]
    largest = [max(layer.state_dict().values(), key=lambda t: t.nbytes) for layer in layers]
    tell = getattr(quantization, "pages_of", lambda tensor: "")
    return {
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "weights": sum(layer.in_features * layer.out_features for layer in layers),
        "pages": ", ".join(sorted({tell(tensor) for tensor in largest} - {""})),
    }


def seconds_of(layers: list[nn.Module], x: torch.Tensor) -> float:
    """Of one pass over all layers, each on the same input."""
    start = time.perf_counter()
    for layer in layers:
        layer(x)
    return time.perf_counter() - start


def main() -> None:
    """Answer until stdin ends."""
    rows: dict[str, tuple[list[nn.Module], torch.Tensor]] = {}
    with torch.inference_mode():
        for line in sys.stdin:
            request, answer = json.loads(line), {}
            if "build" in request:
                try:
                    layers, x = make(request["build"])
                except (ValueError, TypeError) as error:  # a scheme that a build does not know
                    answer["error"] = str(error)
                else:
                    rows[request["name"]] = list(layers), x
                    answer = described(layers)
            elif "time" in request:
                answer["seconds"] = seconds_of(*rows[request["time"]])
            else:
                rows.clear()
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
