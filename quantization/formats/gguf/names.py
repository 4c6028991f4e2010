"""Names of tensors in GGUF, for the architectures that are known, and without one.

The names are those of the package gguf. llama.cpp turns pairs of features as neighbours, where
transformers turns halves of a head against each other: for the architecture ``llama`` the rows of
the query and key projections stand in another order in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantization.formats.errors import FormatError
from quantization.ops.extras import need

__all__ = ["ARCHITECTURES", "Architecture", "Names", "architecture_for", "architecture_named"]

_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_BLOCK = (
    "input_layernorm",
    *_ATTENTION,
    "post_attention_layernorm",
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_ATTENTION_BIAS = ("attention_bias", "self_attn.q_proj")
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
_OUTER = (EMBEDDING, "model.norm", HEAD)
_SHOWN = 5


@dataclass(frozen=True)
class Architecture:
    """What GGUF calls a family of models, and what transformers does.

    Attributes:
        name: GGUF's.
        model_types: of the configs of transformers that are written so; the first is read back.
        model_class: of transformers.
        block: modules of a block, by their names in it.
        is_permuted: whether the rows of the query and key projections stand in llama.cpp's order.
        biases: what a config calls biases that a model may have or not, and where they would be.
    """

    name: str
    model_types: tuple[str, ...]
    model_class: str
    block: tuple[str, ...] = _BLOCK
    is_permuted: bool = False
    biases: tuple[tuple[str, str], ...] = ()


#: All architectures that are known, by GGUF's name.
ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture(
            "llama",
            ("llama", "mistral"),
            "LlamaForCausalLM",
            is_permuted=True,
            biases=(_ATTENTION_BIAS, ("mlp_bias", "mlp.up_proj")),
        ),
        Architecture("qwen2", ("qwen2",), "Qwen2ForCausalLM"),
        Architecture(
            "qwen3",
            ("qwen3",),
            "Qwen3ForCausalLM",
            (*_BLOCK, "self_attn.q_norm", "self_attn.k_norm"),
            biases=(_ATTENTION_BIAS,),
        ),
    )
}
_INSTEAD = "plain=True takes tensors by the names they have"


def architecture_for(config: Mapping[str, Any] | None) -> Architecture:
    """The architecture of a model with that config of transformers.

    Raises:
        FormatError: if there is no config, or it is of another model; those known are named.

    Example:
        >>> architecture_for({"model_type": "mistral"}).name
        'llama'
    """
    if config is None:
        raise FormatError(
            f"the model has no config, which would say what its tensors are; {_INSTEAD}"
        )
    for each in ARCHITECTURES.values():
        if config.get("model_type") in each.model_types:
            return each
    known = [kind for each in ARCHITECTURES.values() for kind in each.model_types]
    raise FormatError(
        f"models of type {config.get('model_type')!r} have no known names in GGUF; "
        f"those of {', '.join(known)} have; {_INSTEAD}"
    )


def architecture_named(name: Any) -> Architecture:
    """The architecture of a GGUF file.

    Raises:
        FormatError: for another; those known are named.

    Example:
        >>> architecture_named("qwen2").model_class
        'Qwen2ForCausalLM'
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    raise FormatError(
        f"the file holds a model of the architecture {name!r}; known are "
        f"{', '.join(ARCHITECTURES)}; {_INSTEAD}"
    )


class Names:
    """Names of the tensors of one model, both ways.

    Args:
        architecture: of the model.
        blocks: how many it has.
        queries: heads of them.
        keys: heads of them.
    """

    def __init__(self, architecture: Architecture, blocks: int, queries: int, keys: int) -> None:
        gguf = need("gguf", "gguf")
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        table = gguf.get_tensor_name_map(kinds[architecture.name], blocks)
        self._architecture, self._heads = architecture, (queries, keys)
        inner = (
            f"model.layers.{i}.{module}" for i in range(blocks) for module in architecture.block
        )
        self._outward = {module: table[module] for module in (*_OUTER, *inner)}
        self._inward = {name: module for module, name in self._outward.items()}

    def in_file(self, key: str) -> str:
        """GGUF's name of a key of a state dict.

        Raises:
            FormatError: if the architecture has no such tensor.
        """
        return self._renamed(key, self._outward, "the model has the tensor")

    def in_model(self, name: str) -> str:
        """The key in a state dict of a tensor of a file.

        Raises:
            FormatError: if the architecture has no such tensor.
        """
        return self._renamed(name, self._inward, "the file has the tensor")

    def _renamed(self, name: str, table: Mapping[str, str], what: str) -> str:
        module, _, kind = name.rpartition(".")
        if module not in table or kind not in ("weight", "bias"):
            raise FormatError(
                f"{what} {name}, which is none of the architecture {self._architecture.name}"
            )
        return f"{table[module]}.{kind}"

    def check_complete(self, keys: Iterable[str]) -> None:
        """Raise FormatError unless each module but the head has its weight among those keys."""
        wanted = {f"{module}.weight" for module in self._outward if module != HEAD}
        missing = sorted(wanted.difference(keys))
        if missing:
            more = ", ..." if len(missing) > _SHOWN else ""
            raise FormatError(
                f"{len(missing)} tensors of the architecture {self._architecture.name} are "
                f"missing: {', '.join(missing[:_SHOWN])}{more}"
            )

    def order(self, key: str, rows: int, *, into_file: bool) -> np.ndarray | None:
        """Which row comes to stand at each place; None where rows stay where they are.

        Raises:
            FormatError: if the rows are no whole heads.
        """
        module = key.rpartition(".")[0]
        places = [module.endswith(kind) for kind in (".self_attn.q_proj", ".self_attn.k_proj")]
        if not self._architecture.is_permuted or not any(places):
            return None
        heads = self._heads[places.index(True)]
        if rows % (2 * heads):
            raise FormatError(f"{key} has {rows} rows, no even number for each of {heads} heads")
        halves = (heads, 2, rows // heads // 2) if into_file else (heads, rows // heads // 2, 2)
        return np.arange(rows).reshape(halves).swapaxes(1, 2).reshape(-1)
