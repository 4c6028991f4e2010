"""Whether a model is as it should be: its codes, and the kernels that read them."""
