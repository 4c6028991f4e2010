"""A character-level decoder small enough to ship: pre-norm transformer of plain `nn.Linear` layers.

The demonstration quantizes it like any user's model; nothing here knows about quantization.
Weights are stored as float16 in one `.npz` and computed with in float32.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "char_model.npz"
HELD_OUT_TEXT = FOLDER / "held_out.txt"
SHAPE = ("width", "layers", "heads", "context")


def rotate(x: Tensor) -> Tensor:
    """Turn pairs of features by an angle that grows with the position (RoFormer, Su et al. 2021).

    Args:
        x: [batch, heads, positions, features], features even.

    Returns:
        A tensor of the same shape and dtype; dot products of two turned vectors depend on their
        distance only.

    Example:
        >>> rotate(torch.ones(1, 1, 3, 4))[0, 0, 0].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    positions, features = x.shape[-2:]
    half = features // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angle = torch.arange(positions, dtype=torch.float32, device=x.device)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Attention(nn.Module):
    """Causal self-attention: [batch, positions, width] -> the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Let every position read itself and those before it."""
        batch, positions, width = x.shape
        split = self.query_key_value(x).view(batch, positions, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            rotate(query), rotate(key), value, is_causal=True
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, positions, width))


class Block(nn.Module):
    """One pre-norm transformer block: [batch, positions, width] -> the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add what attention and the feed-forward layers find."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(functional.relu(self.up(self.feed_forward_norm(x))).square())


class CharModel(nn.Module):
    """Predicts the next character.

    Args:
        vocabulary: every character the model knows; a character's id is its place here.
        width: features of a position, a multiple of `2 * heads`.
        layers: number of blocks.
        heads: attention heads of a block.
        context: most positions the model was trained to look at.

    Example:
        >>> model = CharModel("ab ", width=8, layers=1, heads=2, context=16)
        >>> model(model.encode("a b")[None]).shape
        torch.Size([1, 3, 3])
    """

    def __init__(self, vocabulary: str, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.vocabulary, self.width, self.layers = vocabulary, width, layers
        self.heads, self.context = heads, context
        self.embedding = nn.Embedding(len(vocabulary), width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(vocabulary))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [batch, positions, len(vocabulary)] for int64 ids [batch, positions]."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def encode(self, text: str) -> Tensor:
        """Ids (int64 [len(text)]) of a text; an unknown character becomes a space."""
        known = {character: index for index, character in enumerate(self.vocabulary)}
        return torch.tensor([known.get(character, known[" "]) for character in text])

    def decode(self, ids: Tensor) -> str:
        """Text of int64 ids [positions]."""
        return "".join(self.vocabulary[index] for index in ids.tolist())


def save(model: CharModel, path: Path) -> None:
    """Write the shape, the vocabulary and the parameters (as float16) to one `.npz`."""
    arrays = {name: value.numpy().astype(np.float16) for name, value in model.state_dict().items()}
    shape = np.array([getattr(model, name) for name in SHAPE])
    code_points = np.array([ord(character) for character in model.vocabulary], dtype=np.int32)
    np.savez_compressed(path, shape=shape, vocabulary=code_points, **arrays)


def load(path: Path = WEIGHTS) -> CharModel:
    """Read a model that `save` wrote, in float32 and eval mode.

    Example:
        >>> load().context
        192
    """
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    vocabulary = "".join(map(chr, arrays.pop("vocabulary")))
    shape = dict(zip(SHAPE, map(int, arrays.pop("shape")), strict=True))
    model = CharModel(vocabulary, **shape)
    state = {name: torch.from_numpy(value.astype(np.float32)) for name, value in arrays.items()}
    model.load_state_dict(state)
    return model.eval()


def windows(ids: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Cut ids [length] in inputs and targets, both [count, context], the targets one step ahead."""
    count = (len(ids) - 1) // context
    if count < 1:
        raise ValueError(f"the text has {len(ids)} characters; give at least {context + 1}")
    return ids[: count * context].view(count, context), ids[1 : count * context + 1].view(count, -1)


@torch.inference_mode()
def bits_per_character(model: CharModel, text: str, batch: int = 16) -> float:
    """Mean cross-entropy of `text` in bits, in windows of `model.context` characters.

    Lower is better; a uniform guess costs log2(len(vocabulary)). A last window that is not full is
    left out.

    Raises:
        ValueError: the text is shorter than one window.

    Example:
        >>> bits_per_character(load(), HELD_OUT_TEXT.read_text()[:1000]) < 3
        True
    """
    inputs, targets = windows(model.encode(text), model.context)
    total = 0.0
    for ids, expected in zip(inputs.split(batch), targets.split(batch), strict=True):
        logits = model(ids).float()
        total += functional.cross_entropy(
            logits.flatten(0, 1), expected.flatten(), reduction="sum"
        ).item()
    return total / targets.numel() / math.log(2)


@torch.inference_mode()
def continue_text(
    model: CharModel, prompt: str, characters: int, seed: int = 0, temperature: float = 0.5
) -> str:
    """Sample `characters` characters after `prompt`; equal arguments give equal text.

    Example:
        >>> len(continue_text(load(), "And God said", 8))
        8
    """
    generator = torch.Generator().manual_seed(seed)
    ids = model.encode(prompt)
    for _ in range(characters):
        logits = model(ids[None, -model.context :])[0, -1].float() / temperature
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat((ids, drawn))
    return model.decode(ids[-characters:]) if characters else ""
