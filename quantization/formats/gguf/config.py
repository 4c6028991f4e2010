"""The config of transformers as metadata of GGUF, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantization.formats.errors import FormatError
from quantization.formats.gguf.names import Architecture

__all__ = ["config_of", "rope_factors", "sizes_in", "sizes_of", "write_config"]

#: Metadata that changes what a model computes, and that the configs made here cannot say.
_REFUSED = (
    "expert_count",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.dimension_sections",
)
_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
_ROPES = ("default", "linear", "llama3")
#: What Llama 3 turns slow features by: these three cannot be told from the factors alone.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


# ---- into a file -------------------------------------------------------------------------------


def sizes_of(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Blocks, heads of queries and heads of keys of a model with that config.

    Raises:
        FormatError: if the config does not say them.

    Example:
        >>> sizes_of({"num_hidden_layers": 2, "num_attention_heads": 4})
        (2, 4, 4)
    """
    heads = _number(config, "num_attention_heads")
    return _number(config, "num_hidden_layers"), heads, config.get("num_key_value_heads") or heads


def write_config(writer: Any, config: Mapping[str, Any]) -> None:
    """Give a GGUFWriter the sizes of a model.

    Args:
        writer: of the package gguf.
        config: of transformers, of a model of a known architecture.

    Raises:
        FormatError: if something is missing, or says what the architecture does not do.
    """
    _check_plain(config)
    blocks, heads, keys = sizes_of(config)
    head, (theta, rope) = _head_of(config), _rope_of(config)
    writer.add_block_count(blocks)
    writer.add_context_length(_number(config, "max_position_embeddings"))
    writer.add_embedding_length(_number(config, "hidden_size"))
    writer.add_feed_forward_length(_number(config, "intermediate_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(_number(config, "rms_norm_eps", float))
    writer.add_vocab_size(_number(config, "vocab_size"))
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(theta)
    if rope["rope_type"] == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _number(config: Mapping[str, Any], key: str, kind: type = int) -> Any:
    if not isinstance(config.get(key), kind):
        what = "a float" if kind is float else "a whole number"
        raise FormatError(f"the config must say {key}, {what}; it says {config.get(key)!r:.60}")
    return config[key]


def _head_of(config: Mapping[str, Any]) -> int:
    """Features of a head."""
    width, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    return config.get("head_dim") or width // heads


def _check_plain(config: Mapping[str, Any]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise FormatError(
            f"hidden_act is {config['hidden_act']!r}; llama.cpp has silu in this architecture"
        )
    slides = config.get("use_sliding_window", config.get("model_type") == "mistral")
    if slides and config.get("sliding_window"):
        raise FormatError(
            f"sliding_window is {config['sliding_window']}; llama.cpp has none in this architecture"
        )


def _rope_of(config: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """The base of the rotary angles, and what scales them, with its ``rope_type``."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta") or 10000.0)
    rope.setdefault("rope_type", rope.pop("type", "default"))
    if rope["rope_type"] not in _ROPES:
        raise FormatError(
            f"rotary angles are of type {rope['rope_type']!r}; written are {', '.join(_ROPES)}"
        )
    return float(theta), rope


def rope_factors(config: Mapping[str, Any]) -> np.ndarray | None:
    """What llama.cpp divides the frequencies of the rotary angles by, float32; or None.

    Source: Llama 3's scaling of rotary angles.

    Example:
        >>> rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **_LLAMA3}
        >>> sizes = {"hidden_size": 256, "num_attention_heads": 2}
        >>> rope_factors({**sizes, "rope_parameters": rope})[[0, -1]].tolist()
        [1.0, 8.0]
        >>> rope_factors({**sizes, "rope_theta": 10000.0})
    """
    theta, rope = _rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    head = _head_of(config)
    waves = 2 * np.pi * theta ** (np.arange(0, head, 2) / head)
    context, low, high = (
        rope[key]
        for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    share = np.clip((context / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - share) / rope["factor"] + share)).astype("float32")


# ---- from a file -------------------------------------------------------------------------------


def sizes_in(facts: Mapping[str, Any], name: str, tensors: int) -> tuple[int, int, int]:
    """Blocks, heads of queries and heads of keys of a model of the architecture of that name.

    Raises:
        FormatError: if its metadata does not say them, or says more blocks than it has tensors.
    """
    blocks = _fact(facts, name, "block_count")
    if blocks > tensors:
        raise FormatError(f"the file says {name}.block_count = {blocks} and has {tensors} tensors")
    heads = _fact(facts, name, "attention.head_count")
    return blocks, heads, _fact(facts, name, "attention.head_count_kv", default=heads)


def config_of(
    facts: Mapping[str, Any],
    architecture: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    factors: np.ndarray | None,
) -> dict[str, Any]:
    """The config of transformers that a file tells.

    Args:
        facts: its metadata.
        architecture: of the model.
        shapes: of its tensors, by their keys in a state dict.
        factors: the numbers of its tensor ``rope_freqs``, if it has one.

    Raises:
        FormatError: if metadata is missing, or says what no such config can say.
    """
    name = architecture.name
    blocks, heads, keys = sizes_in(facts, name, len(shapes))
    width = _fact(facts, name, "embedding_length")
    head = _fact(facts, name, "attention.key_length", default=width // heads)
    _check_known(facts, architecture, head)
    sizes = {
        "hidden_size": width,
        "intermediate_size": _fact(facts, name, "feed_forward_length"),
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": head,
    }
    return {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_types[0],
        "hidden_act": "silu",
        **sizes,
        "max_position_embeddings": _fact(facts, name, "context_length"),
        "rms_norm_eps": _short(_fact(facts, name, "attention.layer_norm_rms_epsilon", float)),
        "vocab_size": shapes["model.embed_tokens.weight"][0],
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "rope_parameters": _rope_in(facts, name, sizes, factors),
        **{key: f"model.layers.0.{module}.bias" in shapes for key, module in architecture.biases},
        **{
            f"{short}_token_id": facts.get(f"tokenizer.ggml.{long}_token_id")
            for short, long in _TOKENS.items()
        },
    }


def _check_known(facts: Mapping[str, Any], architecture: Architecture, head: int) -> None:
    """Raise for metadata that models of the class do not obey."""
    turned = facts.get(f"{architecture.name}.rope.dimension_count", head)
    if turned != head:
        raise FormatError(
            f"the file turns {turned} of the {head} features of a head; models of "
            f"{architecture.model_class} turn all"
        )
    for key in _REFUSED:
        value = facts.get(f"{architecture.name}.{key}")
        if value:
            raise FormatError(
                f"the file says {architecture.name}.{key} = {value}, which models of "
                f"{architecture.model_class} do not do"
            )


def _fact(
    facts: Mapping[str, Any], name: str, key: str, kind: type = int, default: Any = None
) -> Any:
    value = facts.get(f"{name}.{key}", default)
    if not isinstance(value, kind) or not value > 0:
        what = "a number above 0" if kind is float else "one whole number above 0"
        raise FormatError(f"the file must say {name}.{key}, {what}; it says {value!r:.60}")
    return value


def _short(number: float) -> float:
    """The shortest decimal that is this number in float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _rope_in(
    facts: Mapping[str, Any], name: str, sizes: Mapping[str, int], factors: np.ndarray | None
) -> dict[str, Any]:
    theta = _short(_fact(facts, name, "rope.freq_base", float, 10000.0))
    kind = facts.get(f"{name}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise FormatError(f"rotary angles are of type {kind!r}; read are none and linear")
    if factors is not None:
        rope = {"rope_type": "llama3", "rope_theta": theta, **_LLAMA3}
        rope["factor"] = _short(factors.max(initial=1))
        known = rope_factors({**sizes, "rope_parameters": rope})
        if known is None or known.shape != factors.shape or not np.allclose(known, factors, 1e-4):
            raise FormatError("the tensor rope_freqs has other factors than those of Llama 3")
        return rope
    if kind == "linear":
        factor = _short(_fact(facts, name, "rope.scaling.factor", float))
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}
