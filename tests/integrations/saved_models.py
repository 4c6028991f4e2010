"""Small float models in folders, and what the tests ask of models that came out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantization.layers.quantized_module import QuantizedModule
from tests import tiny_models

KINDS = ["llama", "tied", "gpt2", "bert", "t5", "mixtral"]

#: A pattern of every table of tokens and every output layer of those.
EVERY_EMBEDDING = r"re:(embed_tokens|shared|wte|word_embeddings|lm_head|decoder)$"


def load(kind: str, folder: Path, **options: Any) -> Any:
    return type(tiny_models.random_model(kind)).from_pretrained(folder, **options)


def quantized(model: nn.Module) -> dict[str, QuantizedModule]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedModule)}


def logits(kind: str, model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_models.inputs_for(kind)).logits


def assert_same(got: Any, wanted: Any) -> None:
    """The same layers, and every tensor of them equal bit for bit."""
    assert _classes(got) == _classes(wanted)
    mine, theirs = got.state_dict(), wanted.state_dict()
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert mine[key].dtype == tensor.dtype and torch.equal(mine[key], tensor), key
    buffers = dict(wanted.named_buffers())
    for name, buffer in got.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def _classes(model: nn.Module) -> dict[str, str]:
    """By name: torch makes a class of its own for each module that is parametrized."""
    return {
        name: f"{type(module).__module__}.{type(module).__qualname__}"
        for name, module in model.named_modules()
    }
