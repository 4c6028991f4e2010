"""The settings of AutoRound, whose checkpoints are packed as those of GPTQ or AWQ.

``packing_format`` (``backend`` in older files) says how: after ``auto_round:`` there is
``auto_gptq`` (zero points less one), ``auto_awq``, or the name of a kernel or nothing, which is
GPTQ's packing with zero points as they are. ``extra_config`` has the settings of single layers, by
name or pattern.

Source: auto-round, ``auto_round/export/export_to_autoround/export.py``,
``auto_round/inference/convert_model.py`` and ``auto_round/utils/bit_packing.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantization.formats.errors import FormatError
from quantization.formats.folders import Folder, is_named

__all__ = ["AWQ", "GPTQ", "GPTQ_V2", "METHODS", "own_settings", "packing_of"]

METHODS = ("auto-round", "intel/auto-round")
GPTQ, GPTQ_V2, AWQ = "gptq", "gptq_v2", "awq"
#: What may stand behind ``auto_round:``, but for a kernel after a further colon.
_PACKINGS = {
    **dict.fromkeys(("auto_gptq", "gptq", "auto"), GPTQ),
    **dict.fromkeys(("auto_awq", "awq"), AWQ),
    **dict.fromkeys(
        ("", "exllama", "exllamav2", "gptqmodel", "torch", "triton", "tritonv2"), GPTQ_V2
    ),
}
_DEFAULT = "auto_round:auto_gptq"  # of AutoRound and of vLLM


def packing_of(source: Folder) -> str | None:
    """How the codes of a folder of AutoRound are packed; None where another program wrote it.

    Returns:
        :data:`GPTQ`, :data:`GPTQ_V2` (zero points as they are) or :data:`AWQ`.

    Raises:
        FormatError: for another packing, and for weights that are more than integers.
    """
    if source.settings.get("quant_method") not in METHODS:
        return None
    given = source.setting("packing_format", str, source.setting("backend", str, _DEFAULT))
    program, _, rest = given.lower().partition(":")
    packing = _PACKINGS.get(rest.split(":")[0] if "marlin" not in rest else rest)
    if program not in ("auto_round", "autoround", "auto") or packing is None:
        raise FormatError(
            f"{source.path} is packed as {given!r:.60}; those of AutoRound that are read are "
            "auto_round, auto_round:auto_gptq and auto_round:auto_awq"
        )
    for key in ("rotation_config", "transform_config", "super_bits", "super_group_size"):
        if source.settings.get(key):
            raise FormatError(
                f"{source.path} is quantized with {key}, for which there is no place here"
            )
    _check_integers(source, source.settings, "the model")
    return packing


def own_settings(source: Folder, name: str) -> Mapping[str, Any]:
    """What ``extra_config`` says of one layer: under its name, else under the first pattern.

    Raises:
        FormatError: for a pattern that is none, or weights that are more than integers.
    """
    entries = source.setting("extra_config", dict, {})
    found = entries.get(name)
    if found is None:
        where = f"{source.path}: extra_config"
        matching = (v for key, v in entries.items() if is_named(name, f".*(?:{key})", where))
        found = next(matching, {})
    if not isinstance(found, Mapping):
        raise FormatError(f"{source.path}: extra_config of {name} is no object")
    _check_integers(source, found, name)
    return found


def _check_integers(source: Folder, settings: Mapping[str, Any], name: str) -> None:
    kind, activations = settings.get("data_type"), settings.get("act_bits")
    if kind not in (None, "int"):
        raise FormatError(f"{source.path}: {name} has data_type {kind!r:.60}; 'int' is read")
    if isinstance(activations, int) and activations < 16:
        raise FormatError(
            f"{source.path}: {name} has activations of {activations} bits (act_bits), and weights "
            "packed for that; weights under activations of 16 bits are read"
        )
