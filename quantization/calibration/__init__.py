"""What a float model does, measured: the inputs of its layers, and how far another model is off.

known = calibrate(model)                          # no data at all: the model is fed made-up ids
known = calibrate(model, batches, statistics="hessian", file="known.safetensors")
divergence(quantized, model, batches)
"""

from quantization.calibration.calibrate import calibrate
from quantization.calibration.evaluate import Divergence, Perplexity, divergence, perplexity
from quantization.calibration.files import load_statistics, save_statistics

__all__ = [
    "Divergence",
    "Perplexity",
    "calibrate",
    "divergence",
    "load_statistics",
    "perplexity",
    "save_statistics",
]
