"""Formats of others: each module reads one into a StoredModel, or writes one out of it.

========  ==================================  ========  ==============================
format    module                              extra     functions
========  ==================================  ========  ==============================
``gguf``  :mod:`quantization.formats.gguf`    ``gguf``  ``read_gguf``, ``write_gguf``
========  ==================================  ========  ==============================
"""
