"""GGUF, the file of llama.cpp: read, written, and its tokenizer taken out."""

from quantization.formats.gguf.reader import read_gguf
from quantization.formats.gguf.tokenizer import save_tokenizer
from quantization.formats.gguf.writer import WrittenTensor, write_gguf

__all__ = ["WrittenTensor", "read_gguf", "save_tokenizer", "write_gguf"]
