"""Every architecture of transformers, small: configs shrunk by the names of their fields."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch

MOST_PARAMETERS = 6_000_000

#: What a small config leaves to be computed or chosen anew.
_LEFT_OUT = {
    "transformers_version", "architectures", "torch_dtype", "dtype", "_name_or_path", "id2label",
    "label2id", "out_features", "out_indices", "_out_features", "_out_indices", "stage_names",
}  # fmt: skip


class Sizes(NamedTuple):
    """Of a small model; the layers are those of the class where that is None."""

    width: int
    layers: int | None
    key_heads: int


_TRIED = (
    Sizes(32, 2, 2), Sizes(32, 2, 4), Sizes(64, 2, 2), Sizes(32, None, 2), Sizes(32, None, 4),
    Sizes(128, 2, 4),
)  # fmt: skip

#: Names of fields -> the most that a small config has there, or how it is found; the first counts.
_MOST: tuple[tuple[str, Any], ...] = (
    (r"(token_ids?|_id|_index|_idx)$", lambda value, sizes: value if value < 100 else 1),
    (r"kernel|(conv|norm).*num_groups?$", lambda value, sizes: value),
    (r"vocab|num_embeddings|codebook_size|n_codes", 128),
    (r"(num|n)_?.*(key_value|kv)_?heads|multi_query_group_num|num_kv",
     lambda value, sizes: min(value, sizes.key_heads)),
    (r"heads?$|num_heads|n_head|attention_heads|head_num",
     lambda value, sizes: {3: 2}.get(value, min(value, 4))),
    (r"d_head|head_dim|d_kv|kv_channels|head_size|rope_dim|rotary_dim|qk_",
     lambda value, sizes: min(value, sizes.width // 4)),
    (r"layers?$|num_.*layers|n_layer|blocks?$|depth|num_stages|stages|loops$",
     lambda value, sizes: min(value, sizes.layers or value)),
    (r"experts_per_tok|topk|top_k|moe_k", 2),
    (r"experts|n_routed", 4),
    (r"n_group|num_groups?$", 1),
    (r"image_size|img_size|input_size|crop|resolution|spatial", 32),
    (r"patch_size|stride|tubelet|temporal|num_channels$|in_chans|num_labels|window", 16),
    (r"max_.*(len|pos)|position|n_ctx|seq_len|max_source|max_target|context", 64),
    (r"inter|d_ff|ffn|mlp|feed", lambda value, sizes: min(value, 2 * sizes.width)),
    (r"_dim$|dim_|inner|size|dim|channel|width|d_model|n_embd|feature|hidden|embed|rank",
     lambda value, sizes: min(value, sizes.width)),
    (r"", 4096),
)  # fmt: skip


def registry() -> dict[str, list[str]]:
    """Types of models -> names of their classes in the auto classes, those of heads first."""
    from transformers.models.auto import modeling_auto

    found: dict[str, dict[str, None]] = {}
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL") and name.endswith("MAPPING_NAMES"):
            for kind, classes in mapping.items():
                for each in [classes] if isinstance(classes, str) else classes:
                    found.setdefault(kind, {})[each] = None
    return {kind: [*found[kind]][::-1] for kind in sorted(found)}


def small_config(cls: Any) -> Any:
    """A config of which a class makes a small model.

    Raises:
        Exception: the first reason why none was found: a package that it needs, say.
    """
    from transformers.initialization import no_init_weights

    plain = cls.config_class().to_dict()
    first: Exception | None = None
    for sizes in _TRIED:
        try:
            config = cls.config_class.from_dict(_shrunk(plain, sizes))
            with torch.device("meta"), no_init_weights():
                count = sum(parameter.numel() for parameter in cls(config).parameters())
            if 0 < count <= MOST_PARAMETERS:
                return config
            raise ValueError(f"{count} parameters")
        except Exception as error:
            first = first or error
    raise first or AssertionError


def _shrunk(plain: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    made = {key: _small(key, value, sizes) for key, value in plain.items() if key not in _LEFT_OUT}
    layers = sizes.layers
    for key, value in made.items():
        if layers and isinstance(value, list) and len(value) > 8 and isinstance(value[0], str):
            made[key] = value[: layers - 1] + value[-1:]  # the last kind of layer too
    return made


def _small(key: str, value: Any, sizes: Sizes) -> Any:
    if key == "vocab_size" and value is None:
        return 128
    if key == "per_layer_config" and sizes.layers and isinstance(value, dict):
        value = {index: one for index, one in value.items() if int(index) < sizes.layers}
    if isinstance(value, dict):
        return _shrunk(value, sizes)
    if isinstance(value, list | tuple) and value and all(type(one) is int for one in value):
        return [_small(key, one, sizes) for one in value]
    if type(value) is not int or value < 0:
        return value
    most = next(most for pattern, most in _MOST if re.search(pattern, key.lower()))
    return min(value, most) if isinstance(most, int) else most(value, sizes)
