"""The JSON beside the tensors of a checkpoint: what is in which file, and how to read the bits.

Version 1. A folder holds safetensors files, of the names that transformers gives them, and
``quantization.json``::

    format            "quantization-checkpoint"
    format_version    1
    required_features names of what a reader must know to read this one right: "input_order",
                      "input_scale" where a layer has one
    written_by        name and version of the writer
    how_to_read       the layout and the formula, in words
    files             {file: {"bytes": size, "header_sha256": of its header with the length}}
    layers            {dotted name: {"kind", "shape", "dtype", "scheme", "name", ...}}
    tensors           {key: {"sha256": of its bytes}}
    ties              {key of a state dict: the key whose tensor it shares}
    methods           {dotted name: method by which the codes of the layer were found}
    other_files       {file: {"bytes": size, "sha256": of it}}: all else that was written with
                      them; "/" parts the name of a file from that of its sub-folder
    sha256            of this very object without this field, as JSON with sorted keys, no blanks
                      and ASCII alone; :func:`sealed` adds it

The last three came later: documents without them are read, and less of their folders is verified
or known.

Keys of tensors are those of the model's state dict. Every tensor stands once; a tied one under its
first key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from quantization.checkpoint.disk.json_files import CheckpointError, parse_json
from quantization.checkpoint.stored_model import KINDS, StoredLayer
from quantization.schemes.column_order import COLUMN_PARTS, check_columns
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme
from quantization.version import VERSION as VERSION_OF_PACKAGE

__all__ = [
    "CONFIG",
    "FILE",
    "VERSION",
    "Document",
    "FileRecord",
    "OtherFile",
    "packed_of",
    "parts_of",
    "sealed",
    "tensors_of",
]

FILE = "quantization.json"
CONFIG = "config.json"  # of transformers
VERSION = 1
_FORMAT = "quantization-checkpoint"
_FEATURES = frozenset(COLUMN_PARTS)
_CONV1D = "nf"  # field of a layer: outputs of the Conv1D of transformers that it came from
_LAYER = {"kind", "name", "shape", "dtype", "scheme", "group", _CONV1D, "padding_idx"}  # its fields
_SEAL = "sha256"
_HASH = re.compile("[0-9a-f]{64}")

HOW_TO_READ = (
    "Tensors lie in the safetensors files under the keys of the model's state dict; NumPy is "
    "enough to read them.",
    "weight[n, k] = (value - zero_point) * scale, computed in float32, with n the row, k the "
    "column and g = k // group the group; group = in_features where the scheme has no groups.",
    "kind int8_linear: value = int8_weights[n, k], scale = scales[n], zero_point = 0.",
    "kinds linear and embedding: packed_weights[n] is a row of bytes. Its bits, the lowest bit of "
    "each byte first, are the codes of the row one after the other, each of `bits` bits, lowest "
    "bit first: numpy.unpackbits(row, bitorder='little')[: in * bits].reshape(in, bits).",
    "value: codebook[0 or n, code] where there is a codebook; else the code, unsigned with "
    "zero points, in two's complement without. Grid ternary: a byte is 5 codes of base 3, the "
    "first the lowest digit; value = digit, of which 2 stands for -1.",
    "scale: scales[n, g] as it is; or scales[n, g] * scale_steps[n] if there are scale_steps; or "
    "2 ** (scales[n, g] - 127), 255 being NaN, in the grid mxfp4.",
    "zero_point: zero_points[n, g] if they are floats; if they are int8, (zero_points[n, g] + 128) "
    "* 2 ** (bits - 8); if they are uint8, codes packed as the weights are, one a group; 0 if "
    "there are none.",
    "where there is an input_scale, the weight is multiplied by input_scale[k] once more.",
    "where there is an input_order, what is stored for k belongs to column input_order[k].",
)


@dataclass(frozen=True)
class FileRecord:
    """What is known of a file: its bytes, the hash of its header, the hash of each tensor."""

    nbytes: int
    header_sha256: str
    sha256: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "bytes": self.nbytes,
            "header_sha256": self.header_sha256,
            "sha256": dict(self.sha256),
        }

    @classmethod
    def from_dict(cls, plain: Any, what: str) -> FileRecord:
        """The reverse of :meth:`to_dict`.

        Raises:
            CheckpointError: if it is not that.
        """
        match plain:
            case {"bytes": int(nbytes), "header_sha256": str(header), "sha256": dict(sha256)}:
                if all(_is_hash(value) for value in (header, *sha256.values())):
                    return cls(nbytes, header, sha256)
        raise CheckpointError(f"{what} is no record of a file")


@dataclass(frozen=True)
class OtherFile:
    """What is known of a file without tensors of layers: its bytes and their hash."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Document:
    """The content of ``quantization.json``.

    Attributes:
        files: records of the safetensors files by name.
        layers: layers by dotted name; their weights are read by nobody yet (``load`` raises).
        ties: as in :class:`quantization.checkpoint.stored_model.StoredModel`.
        others: records of all other files by name; None in a document that was written before there
            were any.
        is_sealed: whether the document had its own hash, which is then the right one.
    """

    files: Mapping[str, FileRecord]
    layers: Mapping[str, StoredLayer]
    ties: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, OtherFile] | None = None
    is_sealed: bool = True

    def to_json(self) -> str:
        """The text of the file."""
        schemes = {layer.scheme for layer in self.layers.values()}
        plain = {
            "format": _FORMAT,
            "format_version": VERSION,
            "required_features": [
                name for name in COLUMN_PARTS if any(getattr(scheme, name) for scheme in schemes)
            ],
            "written_by": f"quantization {VERSION_OF_PACKAGE}",
            "how_to_read": HOW_TO_READ,
            "files": {
                name: {"bytes": record.nbytes, "header_sha256": record.header_sha256}
                for name, record in self.files.items()
            },
            "layers": {name: _plain_layer(layer) for name, layer in self.layers.items()},
            "ties": dict(self.ties),
            "methods": {name: layer.method for name, layer in self.layers.items() if layer.method},
            "tensors": {
                key: {"file": name, "sha256": sha256}
                for name, record in self.files.items()
                for key, sha256 in record.sha256.items()
            },
        }
        if self.others is not None:
            plain["other_files"] = {
                name: {"bytes": other.nbytes, "sha256": other.sha256}
                for name, other in self.others.items()
            }
        return json.dumps(sealed(plain), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: bytes, what: str = FILE) -> Document:
        """The document of that text.

        Raises:
            CheckpointError: if it is none, of a later version, of features unknown here, or is not
                as it was written.
        """
        plain = parse_json(text, what)
        _check_version(plain, what)
        if _SEAL in plain and plain[_SEAL] != sealed(plain)[_SEAL]:
            raise CheckpointError(
                f"{what} was changed after it was written (its sha256 is another): take the file "
                "as it was written, or write the folder anew"
            )
        for name in ("files", "layers", "ties", "tensors"):
            if not isinstance(plain.get(name), dict):
                raise CheckpointError(f"{what} has no {name!r}, or one that is no object")
        layers = {name: _layer_from(name, layer, what) for name, layer in plain["layers"].items()}
        layers = _with_methods(layers, plain.get("methods", {}), what)
        ties = plain["ties"]
        if not all(isinstance(key, str) for key in ties.values()):
            raise CheckpointError(f"{what}: ties are between keys")
        others = _others_from(plain, what)
        return cls(_files_from(plain, what), layers, ties, others, _SEAL in plain)


def sealed(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a document with their hash.

    Example:
        >>> sealed({"format_version": 1})["sha256"][:8]
        'd88bf399'
    """
    content = {name: value for name, value in plain.items() if name != _SEAL}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return content | {_SEAL: hashlib.sha256(text.encode()).hexdigest()}


def _check_version(plain: Mapping[str, Any], what: str) -> None:
    if plain.get("format") != _FORMAT:
        raise CheckpointError(f"{what} is not of the format {_FORMAT}: {plain.get('format')!r:.60}")
    version, features = plain.get("format_version"), plain.get("required_features", [])
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{what} has the format version {version!r:.60}; expected 1")
    if not isinstance(features, list) or not all(isinstance(name, str) for name in features):
        raise CheckpointError(f"{what} has required_features that are no list of names")
    unknown = sorted({*features} - _FEATURES)
    if version > VERSION or unknown:
        needs = f"format version {version}" if version > VERSION else f"the features {unknown}"
        raise CheckpointError(
            f"{what} needs {needs}; this package reads up to version {VERSION}: install a later one"
        )


def _files_from(plain: Mapping[str, Any], what: str) -> dict[str, FileRecord]:
    hashes: dict[str, dict[str, str]] = {name: {} for name in plain["files"]}
    for key, entry in plain["tensors"].items():
        match entry:
            case {"file": str(name), "sha256": str(sha256)} if name in hashes:
                hashes[name][key] = sha256
            case _:
                raise CheckpointError(f"{what}: tensor {key} has no file and sha256")
    files = {}
    for name, entry in plain["files"].items():
        record = dict(entry) if isinstance(entry, dict) else {}
        files[name] = FileRecord.from_dict(record | {"sha256": hashes[name]}, f"{what}: {name}")
    return files


def _others_from(plain: Mapping[str, Any], what: str) -> dict[str, OtherFile] | None:
    entries = plain.get("other_files")
    if entries is None:
        return None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{what} has other_files that are no object")
    others = {}
    for name, entry in entries.items():
        match entry:
            case {"bytes": int(nbytes), "sha256": str(sha256)} if _is_hash(sha256):
                others[name] = OtherFile(nbytes, sha256)
            case _:
                raise CheckpointError(f"{what}: {name} is no record of a file")
    return others


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


# ---- layers ----------------------------------------------------------------------------------


def _plain_layer(layer: StoredLayer) -> dict[str, Any]:
    return {
        "kind": layer.kind,
        "name": str(layer.scheme),
        "shape": list(layer.shape),
        "dtype": layer.dtype,
        "scheme": layer.scheme.to_dict(),
        "group": layer.scheme.group(layer.shape[1]),
        **({_CONV1D: layer.shape[0]} if "was_conv1d" in layer.more else layer.more),
    }


def _layer_from(name: str, plain: Any, what: str) -> StoredLayer:
    match plain:
        case {
            "kind": str(kind),
            "shape": [int(rows), int(cols)],
            "dtype": str(dtype),
            "scheme": dict(fields),
        } if kind in KINDS and rows >= 0 <= cols:
            pass
        case _:
            raise CheckpointError(
                f"{what}: layer {name!r} needs a kind out of {', '.join(KINDS)}, a shape, a dtype "
                "and a scheme"
            )
    _check_fields(name, plain, what)
    more = {key: plain[key] for key in (_CONV1D, "padding_idx") if key in plain}
    if not all(value is None or type(value) is int for value in more.values()):
        raise CheckpointError(f"{what}: layer {name!r} has {more}; expected numbers")
    if not -rows <= (more.get("padding_idx") or 0) <= max(0, rows - 1):
        raise CheckpointError(f"{what}: layer {name!r} has {more}, and {rows} rows")
    try:
        scheme = Scheme.from_dict(fields)
        scheme.buffers((rows, cols), dtype)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what}: layer {name!r}: {error}") from None
    if kind == "int8_linear" and scheme != Scheme.int8():
        raise CheckpointError(f"{what}: layer {name!r} is int8, and its scheme is {scheme}")
    if more.pop(_CONV1D, None) is not None:
        more["was_conv1d"] = True
    return StoredLayer(kind, scheme, (rows, cols), dtype, _unread, more)


def _with_methods(
    layers: dict[str, StoredLayer], methods: Any, what: str
) -> dict[str, StoredLayer]:
    if not isinstance(methods, dict) or not all(isinstance(m, str) for m in methods.values()):
        raise CheckpointError(f"{what} has methods that are no names of layers with names of such")
    return {name: replace(layer, method=methods.get(name, "")) for name, layer in layers.items()}


def _check_fields(name: str, plain: Mapping[str, Any], what: str) -> None:
    unknown = sorted(plain.keys() - _LAYER)
    if unknown:
        raise CheckpointError(
            f"{what}: layer {name!r} has the unknown field {unknown[0]!r}; known are "
            f"{', '.join(sorted(_LAYER))}: install a later version of this package, or write the "
            "folder anew"
        )


def _unread() -> PackedWeights:
    raise RuntimeError("a layer of a document has no weights; read_checkpoint gives it some")


def parts_of(layer: StoredLayer) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor that the weight of a layer is stored as, by its name.

    Example:
        >>> from quantization import QWQALinearLayer
        >>> from quantization.checkpoint.stored_model import stored_model
        >>> parts_of(stored_model(QWQALinearLayer(16, 32)).layers[""])
        {'int8_weights': ('int8', (32, 16)), 'scales': ('float32', (32,))}
    """
    buffers = layer.scheme.buffers(layer.shape, layer.dtype)
    if layer.kind == "int8_linear":
        return {
            "int8_weights": ("int8", layer.shape),
            "scales": (buffers["scales"].dtype, layer.shape[:1]),
        }
    return {name: (buffer.dtype, buffer.shape) for name, buffer in buffers.items()}


def tensors_of(layer: StoredLayer) -> dict[str, Any]:
    """Those tensors, loaded.

    Example:
        >>> from quantization import pack_matrix
        >>> list(tensors_of(StoredLayer.of(pack_matrix(torch.eye(8), "w4a"))))
        ['packed_weights', 'scales', 'zero_points']
    """
    packed = layer.load()
    if layer.kind == "int8_linear":
        codes = packed.packed_weights
        return {
            "int8_weights": codes.view(torch.int8),
            "scales": packed.scales.reshape(-1),
        }
    return {name: getattr(packed, name) for name in parts_of(layer)}


def packed_of(layer: StoredLayer, tensors: Mapping[str, Any]) -> PackedWeights:
    """The weight of a layer out of its tensors: the reverse of :func:`tensors_of`.

    Raises:
        TypeError, ValueError: if they do not fit the scheme.
    """
    if layer.kind == "int8_linear":
        codes = tensors["int8_weights"].view(torch.uint8)
        tensors = {"packed_weights": codes, "scales": tensors["scales"].unsqueeze(1)}
    check_columns(tensors)
    return PackedWeights(layer.scheme, layer.shape, **tensors, dtype=layer.dtype)
