"""Float checkpoints that are to be quantized: their files, and the model these are of."""
