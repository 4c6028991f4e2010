"""A whole model quantized by a recipe."""
