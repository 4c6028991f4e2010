"""Quantized models as folders: plain safetensors, and a JSON that says how to read every bit.

    save_quantized(model, "folder")
    model = load_quantized("folder", model)
    quantize_checkpoint("float-folder", "folder", "w4g64a")

:mod:`quantization.checkpoint.format` has the format. Loading reads the files once into
memory of the process's own, or maps them: that takes the time that headers take, the kernels read
the bits in place, and processes that load the same folder share its pages. Nothing is pickled.
"""

from quantization.checkpoint.disk.json_files import CheckpointError
from quantization.checkpoint.reading import read_checkpoint, verify_checkpoint
from quantization.checkpoint.restore import RestoreError
from quantization.checkpoint.save_load import load_quantized, save_quantized
from quantization.checkpoint.streaming import quantize_checkpoint
from quantization.checkpoint.writing import write_checkpoint

__all__ = [
    "CheckpointError",
    "RestoreError",
    "load_quantized",
    "quantize_checkpoint",
    "read_checkpoint",
    "save_quantized",
    "verify_checkpoint",
    "write_checkpoint",
]
