"""Folders of safetensors files as other programs write them, and what their settings say."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from quantization.checkpoint.disk.json_files import read_json
from quantization.checkpoint.disk.safetensors_files import TensorFolder
from quantization.checkpoint.disk.stored_tensor import StoredTensor, key_of
from quantization.checkpoint.format import CONFIG
from quantization.checkpoint.source.companions import assets_of, inner_files
from quantization.checkpoint.source.skeleton import skeleton_of_config
from quantization.checkpoint.stored_model import StoredLayer, StoredModel
from quantization.formats.errors import FormatError
from quantization.numerics.granularity import Granularity, PerGroup
from quantization.numerics.parameters import Mode
from quantization.ops.dtypes import SOURCES
from quantization.schemes.checks import PER_ROW
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme
from quantization.swap.regular import Regular, RegularError

__all__ = [
    "SETTINGS",
    "Folder",
    "containers",
    "granularity_of",
    "is_named",
    "open_folder",
]

#: Where ``config.json`` has what this module calls settings.
SETTINGS = "quantization_config"
OLD_SETTINGS = "compression_config"  # of older versions of compressed-tensors
#: What classes of transformers once saved: causal masks, of four dimensions; frequencies, and what
#: stood for the masked; and what others save of a cache.
_MASKS = re.compile(r"(^|\.)(attn|attention|self_attn)\.bias$")
_OLD_BUFFERS = re.compile(
    r"(^|\.)(rotary_(pos_)?emb(eddings)?\.inv_freq|(attn|attention|self_attn)\.masked_bias"
    r"|(kv?|[qv]|prob)_(scale|zero_point|zp))$"
)
#: Files in which quantizers repeat their settings, which no longer hold for what is made of them.
_SIDECARS = ("quantize_config.json", "quant_config.json", "quantization_config.json")
_SHOWN = 4
_log = logging.getLogger("quantization")
_DECISIVE = ("bits", "group_size", "format", "zero_point")


@dataclass(frozen=True)
class Folder:
    """A model of another program, none of whose numbers has been read.

    Attributes:
        path: of the folder.
        tensors: of all files by key.
        config: of transformers, without the settings; None where there is nothing else.
        settings: how the model was quantized, keys in lower case.
        assets: further files that belong to the model.
        inner: those of sub-folders, by name.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    assets: tuple[Path, ...]
    inner: Mapping[str, Path]

    def names(self, *parts: str) -> list[str]:
        """Layers that have at least one tensor of those names, in the order of their keys."""
        found = (key.rpartition(".") for key in self.tensors)
        return list(dict.fromkeys(name for name, _, part in found if part in parts))

    def tensor(
        self, key: str, dtypes: Iterable[str], shape: tuple[int | None, ...]
    ) -> StoredTensor:
        """A tensor of one of those dtypes and that shape, None being any size.

        Raises:
            FormatError: if it is missing or another one.
        """
        if key not in self.tensors:
            raise FormatError(f"{self.path} has no tensor {key}")
        found, dtypes = self.tensors[key], tuple(dtypes)
        if found.dtype not in dtypes:
            raise FormatError(f"{self.path}: {key} is {found.dtype}; it must be {_either(dtypes)}")
        fits = len(found.shape) == len(shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, found.shape, strict=False)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise FormatError(f"{self.path}: {key} has shape {found.shape}; it must be ({wanted})")
        return found

    def setting(self, name: str, kind: type, default: Any = None) -> Any:
        """A setting of a type; ``default``, if it is not None, where it is missing or null.

        Raises:
            FormatError: if it is missing or of another type.
        """
        value = self.settings.get(name)
        value = default if value is None else value
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            what = "is missing" if value is None else f"is {value!r:.60}"
            raise FormatError(
                f"{self.path}: {name} of the quantization settings {what}; expected {kind.__name__}"
            )
        return value

    def layer(
        self,
        shape: tuple[int, int],
        bits: int,
        granularity: Granularity,
        is_symmetric: bool,
        scales: StoredTensor,
        load: Callable[[Scheme, str], PackedWeights],
        has_order: bool = False,
    ) -> StoredLayer:
        """A linear layer of integers; ``load`` gets its scheme and dtype.

        The dtype is the model's, if its config says one, else that of the scales.
        """
        dtype = self.dtype() or scales.dtype
        scheme = Scheme(
            bits,
            granularity,
            Mode.Symmetric if is_symmetric else Mode.Asymmetric,
            scale_dtype=None if scales.dtype == dtype else scales.dtype,
            input_order=has_order,
        )
        kind = "int8_linear" if scheme == Scheme.int8() else "linear"
        return StoredLayer(kind, scheme, shape, dtype, lambda: load(scheme, dtype))

    def dtype(self) -> str | None:
        """That of the model, if its config says one that layers may have."""
        config = self.config or {}
        inner = config.get("text_config")
        for place in (config, inner if isinstance(inner, Mapping) else {}):
            for key in ("dtype", "torch_dtype"):
                name = str(place.get(key)).removeprefix("torch.")
                if name in SOURCES:
                    return name
        return None

    def model(self, layers: Mapping[str, StoredLayer], used: Iterable[str]) -> StoredModel:
        """The model of those layers and of all tensors that they do not use.

        Tensors of older programs that its class has no place for are left; a warning says so.
        """
        used = set(used)
        tensors = {key: tensor for key, tensor in self.tensors.items() if key not in used}
        stray = _stray(self.path, layers, tensors)
        if stray:
            _log.warning(
                "%s: %d tensors are left, as the model has no place for them: %s%s",
                self.path, len(stray), ", ".join(stray[:_SHOWN]), ", ..." * (len(stray) > _SHOWN),
            )  # fmt: skip
        tensors = {key: tensor for key, tensor in tensors.items() if key not in {*stray}}
        return StoredModel(layers, tensors, {}, self.config, self.assets, self.inner)


def _stray(
    path: Path, layers: Mapping[str, StoredLayer], tensors: Mapping[str, StoredTensor]
) -> list[str]:
    """Keys of what older programs wrote beside a model: buffers of old classes, and zero biases.

    The class of the model decides, where there is one; else what bears the name of a buffer.
    """
    old = [
        key
        for key, tensor in tensors.items()
        if (_MASKS if len(tensor.shape) == 4 else _OLD_BUFFERS).search(key)
    ]
    zeros = [key for name in layers if _is_zero(tensors.get(key := key_of(name, "bias")))]
    if not old and not zeros:
        return []
    try:
        model: Any = skeleton_of_config(path)
    except Exception:  # whatever a config may lead to: then nothing is known of the class
        return old
    modules, wanted = dict(model.named_modules()), model.state_dict().keys()
    known = [key for key in zeros if key.rpartition(".")[0] in modules]
    return [key for key in (*old, *known) if key not in wanted]


def _is_zero(bias: StoredTensor | None) -> bool:
    return bias is not None and bias.dtype in SOURCES and not bias.load().any()


def open_folder(
    path: str | os.PathLike[str],
    method: str | tuple[str, ...],
    sidecar: str | None = None,
    synonyms: Mapping[str, str] | None = None,
) -> Folder:
    """A folder that a quantizer wrote.

    Args:
        path: of the folder.
        method: its ``quant_method``, or those that it may be.
        sidecar: a file that may have the settings beside, or in the place of, ``config.json``.
        synonyms: other names of settings.

    Raises:
        FileNotFoundError: if it is no folder, or has no safetensors files.
        quantization.checkpoint.disk.safetensors_files.CheckpointError: if a file is broken.
        FormatError: if it is not quantized, by another method, or its files contradict each other.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder")
    files = TensorFolder(path)
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else None
    found = []
    if config is not None:
        found += [(CONFIG, plain) for plain in _settings_in(config)]
    if sidecar is not None and (path / sidecar).is_file():
        found.append((sidecar, read_json(path / sidecar)))
    settings = _settings(path, found, synonyms or {})
    methods = (method,) if isinstance(method, str) else method
    settings["quant_method"] = str(settings.get("quant_method", methods[0])).lower()
    if settings["quant_method"] not in methods:
        given = settings["quant_method"]
        raise FormatError(f"{path} was quantized by {given!r:.60}, not by {methods[0]!r}")
    assets = tuple(asset for asset in assets_of(files) if asset.name not in _SIDECARS)
    inner, _ = inner_files(path)
    return Folder(path, files.tensors(), config or None, settings, assets, inner)


def _settings_in(config: dict[str, Any]) -> list[Any]:
    """The settings in a config, taken out of it, where vLLM looks for them too: the first there."""
    inner = config.get("text_config")
    places = ((config, SETTINGS), (inner, SETTINGS), (config, OLD_SETTINGS))
    found = [place.pop(key) for place, key in places if isinstance(place, dict) and key in place]
    if found and isinstance(found[0], dict) and isinstance(found[0].get(SETTINGS), dict):
        found[0] |= found[0].pop(SETTINGS)  # as older versions of compressed-tensors nest it
    return found[:1]


def _settings(
    path: Path, found: list[tuple[str, Any]], synonyms: Mapping[str, str]
) -> dict[str, Any]:
    """The settings of all places as one; the first to say one counts."""
    if not found:
        raise FormatError(f"{path} does not say how it was quantized: {CONFIG} has no {SETTINGS}")
    made: dict[str, Any] = {}
    for where, plain in found:
        if not isinstance(plain, dict):
            raise FormatError(f"{path / where}: the quantization settings are no object")
        for key, value in plain.items():
            key = synonyms.get(key.lower(), key.lower())
            value = value.lower() if key in _DECISIVE and isinstance(value, str) else value
            if key in _DECISIVE and made.get(key) not in (None, value):
                raise FormatError(
                    f"{path / where} has {key} {value!r:.60} beside {made[key]!r:.60}"
                )
            if made.get(key) is None:
                made[key] = value
    return made


def containers(count: int, bits: int) -> int:
    """How many int32 ``count`` dense codes take.

    Example:
        >>> containers(32, 3), containers(33, 3)
        (3, 4)
    """
    return -(-count * bits // 32)


def granularity_of(group: int | None) -> Granularity:
    """Groups of that many columns; None: rows."""
    return PER_ROW if group is None else PerGroup(group)


_regular = lru_cache(256)(Regular)


def is_named(name: str, pattern: str, what: str) -> bool:
    """Whether a regular expression of the settings fits the begin of a name.

    Raises:
        FormatError: if it is none, or takes too long.

    Example:
        >>> is_named("0.down", ".*down", "config.json")
        True
    """
    try:
        return _regular(pattern).match(name)
    except RegularError as error:
        raise FormatError(f"{what}: {error}") from None


def _either(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
