"""Read a quantized weight with json and NumPy alone, by the words of quantization.json."""

import json
import tempfile
from pathlib import Path

import numpy as np
from torch import nn

from quantization import PackedLinearLayer, save_quantized

with tempfile.TemporaryDirectory() as place:
    layer = PackedLinearLayer(100, 4, scheme="w3g32a")
    save_quantized(nn.ModuleDict({"proj": layer}), f"{place}/model")

    # From here on nothing of the package is used.
    document = json.loads((Path(place) / "model/quantization.json").read_text())
    print(*document["how_to_read"], sep="\n")
    entry = document["layers"]["proj"]
    (rows, cols), bits, group = entry["shape"], entry["scheme"]["bits"], entry["group"]

    raw = (Path(place) / "model/model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])

    def tensor(name: str, dtype: str) -> np.ndarray:
        first, last = header[name]["data_offsets"]
        data = raw[8 + length + first : 8 + length + last]
        return np.frombuffer(data, dtype).reshape(header[name]["shape"])

    def codes(packed: np.ndarray, count: int) -> np.ndarray:
        flat = np.unpackbits(packed, axis=1, bitorder="little")[:, : count * bits]
        return flat.reshape(rows, count, bits) @ (1 << np.arange(bits))

    scales = tensor("proj.scales", "<f4")
    zero_points = codes(tensor("proj.zero_points", "u1"), scales.shape[1])
    column = np.arange(cols) // group
    values = codes(tensor("proj.packed_weights", "u1"), cols) - zero_points[:, column]
    weight = values.astype(np.float32) * scales[:, column]

print("same numbers:", np.array_equal(weight, layer.weight.numpy()))
