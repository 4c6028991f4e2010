"""The door to the kernels: arrays and tensors in and out; number types, torch operators."""
