"""The settings of compressed-tensors: config groups, and which layer is of which.

Source: compressed-tensors, ``compressed_tensors/quantization/quant_args.py``, ``quant_config.py``,
``quant_scheme.py`` and ``compressed_tensors/utils/match.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantization.formats.compressed_experts import EXPERTS, is_of_expert
from quantization.formats.errors import FormatError
from quantization.formats.folders import is_named
from quantization.schemes.checks import MX_GROUP

__all__ = [
    "INT",
    "METHOD",
    "MXFP4",
    "PACKED",
    "Group",
    "WeightForm",
    "group_of",
    "groups_from",
    "settings_of",
]

METHOD, PACKED, INT = "compressed-tensors", "pack-quantized", "int-quantized"
MXFP4 = "mxfp4-pack-quantized"
WIDTHS = range(2, 9)  # that are written
_READ_WIDTHS = range(1, 9)
_LINEAR = "Linear"  # the class that a target names
_LAYOUTS = {PACKED: PACKED, INT: INT, "naive-quantized": INT, MXFP4: MXFP4}


@dataclass(frozen=True)
class WeightForm:
    """How the weights of some layers are stored.

    Attributes:
        bits: 1..8; written are 2 or more.
        is_symmetric: whether there are no zero points.
        strategy: ``"group"``, ``"channel"`` (one scale a row) or ``"tensor"``.
        group: columns of a group, with that strategy.
    """

    bits: int
    is_symmetric: bool
    strategy: str
    group: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As ``weights`` of a config group.

        Example:
            >>> WeightForm(4, True, "group", 32).to_dict()["group_size"]
            32
        """
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.is_symmetric,
            "strategy": self.strategy,
            "group_size": self.group,
            "dynamic": False,
        }

    @classmethod
    def from_dict(cls, plain: Any, what: str) -> WeightForm:
        """The reverse of :meth:`to_dict`.

        Raises:
            FormatError: for anything but integers of 1..8 bits by group, row or tensor.
        """
        if not isinstance(plain, Mapping):
            raise FormatError(f"{what}: weights are no object")
        bits, group = plain.get("num_bits", 8), plain.get("group_size")
        strategy = plain.get("strategy")
        if strategy is None:
            strategy = "tensor" if group is None else "channel" if group == -1 else "group"
        if plain.get("type", "int") != "int" or type(bits) is not int or bits not in _READ_WIDTHS:
            raise FormatError(
                f"{what}: weights are {plain.get('type', 'int')!r:.60} of {bits!r:.60} bits; read "
                f"are 'int' of {_READ_WIDTHS[0]}..{_READ_WIDTHS[-1]}, and 'float' of 4 in {MXFP4}"
            )
        if strategy not in ("group", "channel", "tensor"):
            raise FormatError(
                f"{what}: the strategy of weights is {strategy!r:.60}; read are group, channel and "
                "tensor"
            )
        if strategy == "group" and (type(group) is not int or group < 1):
            raise FormatError(f"{what}: group_size is {group!r:.60}; it must be 1 or more")
        is_symmetric = plain.get("symmetric", True)
        if not isinstance(is_symmetric, bool) or plain.get("dynamic"):
            raise FormatError(
                f"{what}: weights are dynamic, or symmetric is neither true nor false"
            )
        return cls(bits, is_symmetric, strategy, group if strategy == "group" else None)


@dataclass(frozen=True)
class Group:
    """A config group.

    Attributes:
        targets: names, ``re:`` patterns and classes of its layers.
        form: of their weights.
        layout: :data:`PACKED`, :data:`INT` or :data:`MXFP4`.
        has_activations: whether activations are to be quantized too.
    """

    targets: tuple[str, ...]
    form: WeightForm
    layout: str = PACKED
    has_activations: bool = False


def settings_of(forms: Mapping[str, WeightForm], ignore: Iterable[str]) -> dict[str, Any]:
    """What ``config.json`` says of layers of those forms.

    Where all are of one form, its group targets every linear layer but the ignored; else each group
    names its layers.

    Raises:
        FormatError: if experts are of several forms.

    Example:
        >>> made = settings_of({"up": WeightForm(4, True, "channel")}, ["lm_head"])
        >>> made["config_groups"]["group_0"]["targets"], made["ignore"]
        (['Linear'], ['lm_head'])
    """
    names: dict[WeightForm, list[str]] = {}
    for name, form in forms.items():
        names.setdefault(form, []).append(name)
    of_experts = [found for found in names.values() if any(map(is_of_expert, found))]
    if len(of_experts) > 1:
        pair = [next(filter(is_of_expert, found)) for found in of_experts]
        raise FormatError(
            f"{METHOD} cannot hold experts of several schemes, as readers take one for all: "
            f"{pair[0]} and {pair[1]} differ; quantize them alike"
        )
    groups = {
        f"group_{number}": {
            "targets": [_LINEAR] if len(names) == 1 else _targets(found),
            "weights": form.to_dict(),
            "input_activations": None,
            "output_activations": None,
            "format": PACKED,
        }
        for number, (form, found) in enumerate(names.items())
    }
    return {
        "quant_method": METHOD,
        "format": PACKED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": groups,
    }


def _targets(names: list[str]) -> list[str]:
    """The names of layers; all experts as one pattern, by which transformers finds their group."""
    others = [name for name in names if not is_of_expert(name)]
    return others if len(others) == len(names) else [*others, f"re:{EXPERTS}$"]


def groups_from(settings: Mapping[str, Any], what: str) -> list[Group]:
    """The config groups that quantize weights.

    Raises:
        FormatError: for settings that are not understood, or that change more than weights.
    """
    if settings.get("transform_config"):
        raise FormatError(
            f"{what} rotates activations as the model runs (transform_config), for which there is "
            "no place here"
        )
    sparsity = settings.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise FormatError(f"{what} is sparse as well (sparsity_config), which is not read")
    plain = settings.get("config_groups")
    if not isinstance(plain, Mapping):
        raise FormatError(f"{what}: config_groups are no object")
    groups = (_group(entry, settings, f"{what}: {name}") for name, entry in plain.items())
    return [group for group in groups if group is not None]


def _group(plain: Any, settings: Mapping[str, Any], what: str) -> Group | None:
    if isinstance(plain, list):
        raise FormatError(f"{what} is the name of a preset; a group must say num_bits and the rest")
    if not isinstance(plain, Mapping) or not _are_texts(plain.get("targets")):
        raise FormatError(f"{what} has no targets")
    if plain.get("weights") is None:
        return None
    layout = plain.get("format") or settings.get("format")
    if not isinstance(layout, str) or layout not in _LAYOUTS:
        raise FormatError(
            f"{what} is in the format {layout!r:.60}; those that are read are {PACKED}, {INT} and "
            f"{MXFP4}"
        )
    activations = (plain.get("input_activations"), plain.get("output_activations"))
    return Group(
        tuple(plain["targets"]),
        (_mx_form if layout == MXFP4 else WeightForm.from_dict)(plain["weights"], what),
        _LAYOUTS[layout],
        any(part is not None for part in activations),
    )


def _mx_form(plain: Any, what: str) -> WeightForm:
    """Floats of 4 bits in groups of 32, which is all that the format may have."""
    given = dict(plain) if isinstance(plain, Mapping) else {}
    wanted = {"num_bits": 4, "type": "float", "group_size": MX_GROUP, "symmetric": True}
    odd = [key for key, value in wanted.items() if given.get(key, True) != value]
    if odd:
        raise FormatError(
            f"{what}: {odd[0]} of weights is {given.get(odd[0])!r:.60}; in {MXFP4} it must be "
            f"{wanted[odd[0]]}"
        )
    return WeightForm(4, True, "group", MX_GROUP)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def group_of(name: str, groups: Iterable[Group], what: str) -> Group:
    """The group of a linear layer: by its name, else by a pattern, else by its class.

    Raises:
        FormatError: if there is none, or a pattern is none.

    Example:
        >>> rows, wide = WeightForm(4, True, "channel"), WeightForm(8, True, "channel")
        >>> groups = [Group(("Linear",), rows), Group(("re:.*down",), wide)]
        >>> group_of("0.down", groups, "").form.bits, group_of("0.up", groups, "").form.bits
        (8, 4)
    """
    targets = {target: group for group in groups for target in group.targets}
    if name in targets:
        return targets[name]
    for target in sorted(targets):
        if target.startswith("re:") and is_named(name, target[3:], what):
            return targets[target]
    if _LINEAR not in targets:
        raise FormatError(f"{what}: {name} is quantized, and no config group targets it")
    return targets[_LINEAR]
