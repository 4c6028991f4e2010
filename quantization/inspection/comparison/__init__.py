"""Two models side by side on the same inputs: where they part, and which layers to keep."""
