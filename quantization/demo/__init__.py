"""The embedded real input: a small character-level transformer, its weights and its held-out text.

`SOURCE.txt` beside this file says where the text comes from and how the weights were made.
"""
