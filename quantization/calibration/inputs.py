"""Inputs for a model that nobody brought data for: random token ids, or text that it writes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantization.calibration.calls import call, output_of, takes

__all__ = ["Made", "batch_of", "is_causal", "made_up", "position_of", "vocabulary_of"]

_CAUSAL, _OTHER, _WRITTEN = (8, 512), (512, 24), (16, 256)  # sequences x tokens
_AT_ONCE = 512  # tokens of a batch, about


@dataclass(frozen=True)
class Made:
    """Inputs that were made up: token ids [sequences, tokens], and what they are in words."""

    ids: Tensor
    source: str

    def batches(self, model: nn.Module) -> list[Any]:
        """The ids as the model takes them, about :data:`_AT_ONCE` tokens each."""
        pads = getattr(getattr(model, "config", None), "pad_token_id", 0) is not None
        rows = max(1, _AT_ONCE // self.ids.shape[1]) if pads else 1  # some take several only then
        return [batch_of(model, part) for part in self.ids.split(rows)]


def made_up(
    model: nn.Module, kind: str | None, tokens: tuple[int, int] | None, seed: int, hessian: bool
) -> Made:
    """Inputs for a model, which is in eval mode.

    Args:
        model: whose forward takes token ids.
        kind: ``"random"``, ``"self"``, or None: text of the model's own for the Hessian of a model
            that writes, else random ids.
        tokens: sequences and tokens of each; None: 16 x 256 of written text, 8 x 512 random ids for
            a causal model, 512 x 24 for another, shorter where its positions end before.
        seed: of all draws.
        hessian: whether products of columns are wanted.

    Raises:
        ValueError: if the model has no vocabulary, or is to write and cannot; says what to pass.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
        >>> made_up(model, "random", (2, 3), 0, False).source
        'random token ids, 2 x 3, seed 0'
    """
    vocabulary = vocabulary_of(model)
    if vocabulary is None:
        raise ValueError(
            f"nothing is known that {type(model).__name__} could be fed with: it has no "
            "config.vocab_size and no embedding; pass batches=, an iterable of what it is called "
            "with (tensors, tuples of arguments, or dicts of named ones)"
        )
    generator = torch.Generator().manual_seed(seed)
    try:
        causal = is_causal(model, vocabulary)
        can_write = causal and _logits_of(model, _draw(vocabulary, (1, 2), generator)) is not None
        if kind == "self" and not can_write:
            raise ValueError(
                f"{type(model).__name__} is no causal language model, so it writes no text; pass "
                "batches='random' or batches of your own"
            )
        writes = kind == "self" or (kind is None and hessian and can_write)
        default = _WRITTEN if writes else _CAUSAL if causal else _OTHER
        shape = tokens or _fitting(model, default)
        source = f"{shape[0]} x {shape[1]}, seed {seed}"
        if writes:
            return Made(_written(model, vocabulary, shape, seed), f"text of its own, {source}")
        return Made(_draw(vocabulary, shape, generator), f"random token ids, {source}")
    except (TypeError, IndexError, RuntimeError) as error:
        error.add_note(
            f"{type(model).__name__} was fed with ids below {vocabulary} that were made up; if it "
            "takes something else, pass batches=, an iterable of what it is called with"
        )
        raise


def vocabulary_of(model: nn.Module) -> int | None:
    """How many token ids a model knows; None if it is not known to take ids.

    Example:
        >>> vocabulary_of(nn.Sequential(nn.Embedding(10, 4))), vocabulary_of(nn.Linear(2, 2))
        (10, None)
    """
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    config: Any = getattr(model, "config", None)
    for place in (config, getattr(config, "get_text_config", lambda: None)()):
        size = getattr(place, "vocab_size", None)
        if isinstance(size, int) and size > 0:
            return size
    sizes = (getattr(module, "num_embeddings", None) for module in model.modules())
    return next((size for size in sizes if isinstance(size, int)), None)


def is_causal(model: nn.Module, vocabulary: int) -> bool:
    """Whether what a model says of a token depends on no later one: tried, with two short calls.

    Example:
        >>> is_causal(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10)), 10)
        True
    """
    config: Any = getattr(model, "config", None)
    if vocabulary < 2 or getattr(config, "is_encoder_decoder", False):
        return False
    ids = _draw(vocabulary, (1, 4), torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % vocabulary
    first, second = (output_of(call(model, batch_of(model, each)))[0] for each in (ids, other))
    if first.ndim != 3 or first.shape[1] != 4:
        return False
    change = (first - second)[0].abs().amax(-1)
    return bool(change[:-1].max() <= 1e-3 * change[-1].clamp(min=1e-30))


def position_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer, where ids go."""
    tensors: Iterable[Tensor] = (*model.parameters(), *model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _draw(vocabulary: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randint(vocabulary, shape, generator=generator)


def batch_of(model: nn.Module, ids: Tensor) -> Any:
    """Ids as a model's forward takes them: by name where it has the names of transformers.

    Example:
        >>> batch_of(nn.Embedding(4, 2), torch.tensor([[1, 3]]))
        (tensor([[1, 3]]),)
    """
    ids = ids.to(position_of(model))
    if not takes(model, "input_ids"):
        return (ids,)
    batch: dict[str, Any] = {"input_ids": ids}
    if takes(model, "attention_mask"):
        batch["attention_mask"] = torch.ones_like(ids)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    if takes(model, "use_cache"):
        batch["use_cache"] = False
    return batch


def _logits_of(model: nn.Module, ids: Tensor) -> Tensor | None:
    """Logits [sequences, tokens, vocabulary] of a model that gives them, else None."""
    logits, is_hidden = output_of(call(model, batch_of(model, ids)))
    is_wide = logits.shape[-1] >= (vocabulary_of(model) or 0)
    return logits if logits.ndim == 3 and is_wide and not is_hidden else None


def _fitting(model: nn.Module, shape: tuple[int, int]) -> tuple[int, int]:
    """As many tokens in sequences that a model's positions allow."""
    config: Any = getattr(model, "config", None)
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    longest = next(filter(None, (getattr(config, name, None) for name in names)), shape[1])
    length = min(shape[1], longest) if isinstance(longest, int) else shape[1]
    return -(-shape[0] * shape[1] // length), length


def _written(model: Any, vocabulary: int, shape: tuple[int, int], seed: int) -> Any:
    """Text that a model samples itself, at temperature 1, each from a random first token."""
    generator = torch.Generator().manual_seed(seed)
    ids = _draw(vocabulary, (shape[0], 1), generator)
    wanted = shape[1] - 1
    if wanted and callable(getattr(model, "can_generate", None)) and model.can_generate():
        ids = ids.to(position_of(model))
        devices = [ids.device] if ids.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, num_beams=1,
                temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
                min_new_tokens=wanted, max_new_tokens=wanted, pad_token_id=0,
            ).cpu()  # fmt: skip
    for _ in range(wanted):
        logits = _logits_of(model, ids)
        assert logits is not None
        chances = logits[:, -1, :vocabulary].float().softmax(-1).cpu()
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    return ids
