"""The entry ``quantization_config`` of a ``config.json``: a table of layers, in plain values.

transformers hands it to :mod:`quantization.integrations.transformers` when it loads the folder::

    quant_method    "quantization", and in parentheses what to import: readers that do not know it
                    show it
    format_version  1
    recipe          the name of a scheme, or rules [{"pattern", "scheme"}], of which the first that
                    matches is followed; null where no such recipe made the layers
    exclude, untie, strict, nonfinite   the arguments of quantization.quantize_model
    unfuse_experts  whether fused experts were given linear layers
    layers          {dotted name: name of its scheme, or "w8a16" for the int8 layer}
    ties            {key of a state dict: the key whose tensor it shares}, for tensors of layers
    schemes         {name: the fields of the scheme}
    how_to_read     the layout and the formula, in words
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantization.autoload import METHOD, METHODS
from quantization.checkpoint.format import HOW_TO_READ
from quantization.checkpoint.stored_model import StoredModel
from quantization.models.recipe import W8A16
from quantization.schemes.scheme import Scheme

__all__ = [
    "ENTRY",
    "METHOD",
    "METHODS",
    "OPTIONS",
    "VERSION",
    "check_plain",
    "entry_of",
    "scheme_of_form",
    "table_of",
]

ENTRY = "quantization_config"
VERSION = 1
OPTIONS = ("exclude", "untie", "strict", "nonfinite", "unfuse_experts")
KEYS = {
    "quant_method", "format_version", "recipe", "layers", "ties", "schemes", "how_to_read", *OPTIONS
}  # fmt: skip

_WORDS = (
    "layers: w8a16 is of the kind int8_linear; any other name is that of a scheme, of the kind "
    "embedding where the model has an embedding, else linear.",
    "A tensor weight of shape [0, 0] may stand where a float weight would. It has no numbers, and "
    "only stops loaders that do not know this format.",
)


def table_of(layers: Mapping[str, str], ties: Mapping[str, str]) -> dict[str, Any]:
    """The part of the entry that is about layers.

    Args:
        layers: name of the scheme of each layer, or ``"w8a16"``.
        ties: tensors of layers that are also another tensor.

    Example:
        >>> table_of({"0": "w4"}, {})["schemes"]["w4"]["bits"]
        4
    """
    names = sorted(set(layers.values()))
    return {
        "layers": dict(layers),
        "ties": dict(ties),
        "schemes": {name: scheme_of_form(name).to_dict() for name in names},
        "how_to_read": [*HOW_TO_READ, *_WORDS],
    }


def entry_of(stored: StoredModel) -> dict[str, Any]:
    """The entry of a model whose layers are known, and not by which recipe they came.

    Example:
        >>> from torch import nn
        >>> from quantization import QWQALinearLayer
        >>> from quantization.checkpoint.stored_model import stored_model
        >>> entry_of(stored_model(nn.Sequential(QWQALinearLayer(8, 8))))["layers"]
        {'0': 'w8a16'}
    """
    forms = {
        name: W8A16 if layer.kind == "int8_linear" else str(layer.scheme)
        for name, layer in stored.layers.items()
    }
    ties = {key: of for key, of in stored.ties.items() if key.rpartition(".")[0] in forms}
    entry = {"quant_method": METHOD, "format_version": VERSION, "recipe": None, "exclude": []}
    return entry | table_of(forms, ties)


def scheme_of_form(form: str) -> Scheme:
    """The scheme of such a name.

    Raises:
        TypeError, ValueError: if it names none.

    Example:
        >>> scheme_of_form("w8a16") == Scheme.int8()
        True
    """
    return Scheme.int8() if form == W8A16 else Scheme.parse(form)


def check_plain(plain: dict[str, Any]) -> None:
    """Raise unless a dict has the keys and values of an entry of this version.

    Raises:
        ValueError: for a later version, an unknown key, or a layer whose scheme is none.

    Example:
        >>> check_plain({"format_version": 1, "layers": {"0": "w4"}})
    """
    if plain.get("quant_method", METHOD) not in METHODS:
        raise ValueError(f"quant_method is {plain['quant_method']!r}, not {METHOD!r}")
    version = plain.get("format_version", None if "layers" in plain else VERSION)
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(
            f"quantization_config has the format_version {version!r:.40}; this package reads "
            f"{VERSION}: install a later one"
        )
    unknown = sorted(map(str, plain.keys() - KEYS))
    if unknown:
        raise ValueError(
            f"quantization_config has the unknown key {unknown[0]!r}; known are "
            f"{', '.join(sorted(KEYS))}"
        )
    if plain.get("layers") is not None:
        _check_layers(plain["layers"], plain.get("ties", {}), plain.get("schemes", {}))


def _check_layers(layers: Any, ties: Any, schemes: Any) -> None:
    if not all(isinstance(value, dict) for value in (layers, ties, schemes)):
        raise ValueError("quantization_config: layers, ties and schemes are objects")
    for name, form in layers.items():
        try:
            scheme = scheme_of_form(form)
            described = Scheme.from_dict(schemes[form]) if form in schemes else scheme
        except (TypeError, ValueError) as error:
            raise ValueError(f"quantization_config: layer {name!r}: {error}") from None
        if described != scheme:
            raise ValueError(
                f"quantization_config: the scheme {form!r} of layer {name!r} is described as "
                f"{described}"
            )
    for key, first in ties.items():
        if key.rpartition(".")[0] not in layers or not isinstance(first, str):
            raise ValueError(f"quantization_config: {key!r} is tied, and is no tensor of a layer")
