"""Weight quantization for PyTorch on C kernels."""
