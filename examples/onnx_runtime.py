# needs: onnx, onnxruntime
"""A packed layer as a MatMulNBits node, run by ONNX Runtime: the same numbers."""

import tempfile

import onnxruntime
import torch

from quantization import PackedLinearLayer
from quantization.formats.onnx import export_layer_onnx

layer = PackedLinearLayer(256, 64, scheme="w4g32a")
x = torch.randn(3, 256)
with tempfile.TemporaryDirectory() as place:
    export_layer_onnx(layer, f"{place}/layer.onnx")
    session = onnxruntime.InferenceSession(f"{place}/layer.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
difference = float((torch.from_numpy(y) - layer(x)).abs().max())
print(f"largest difference: {difference:.1e}")
assert difference < 1e-4
