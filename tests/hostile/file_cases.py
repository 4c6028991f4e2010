"""30 hostile files: each ends in a named error at once, in bounded memory, and leaves nothing."""

from __future__ import annotations

import json
import os
import resource
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantization import load_quantized, quantize_checkpoint, quantize_model, save_quantized
from quantization.checkpoint.format import sealed
from quantization.formats.folders import is_named

CASES: dict[str, Callable[[], None]] = {}
SPARE = 300 << 20  # bytes that a case may take
F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def _bounded(call: Callable[[], Any]) -> str:
    """The error of a call that must have one, of ours or of the system, without much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        call()
    except (ValueError, FileNotFoundError) as error:
        message = f"{error}"
    else:
        raise AssertionError("it was taken")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < SPARE, f"it took {grown >> 20} MiB"
    assert len(message) < 2000, f"a message of {len(message)} letters"
    return message


def _streamed(fill: Callable[[Path], Any], names: str) -> Callable[[], None]:
    def run() -> None:
        with tempfile.TemporaryDirectory() as place:
            source = Path(place, "source")
            source.mkdir()
            fill(source)
            message = _bounded(lambda: quantize_checkpoint(source, Path(place, "new"), "w4g32"))
            assert names in message, message
            assert [path.name for path in Path(place).iterdir()] == ["source"], "something is left"

    return run


def _header(header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> Any:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw = struct.pack("<Q", len(text) if length is None else length) + text + data
    return lambda folder: (folder / "model.safetensors").write_bytes(raw)


def _entry(**changes: Any) -> dict[str, Any]:
    return {"a.weight": F32 | changes}


def _config(**config: Any) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        _header(_entry())(folder)
        (folder / "config.json").write_text(json.dumps(config))

    return fill


def _index(name: str) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        _header(_entry())(folder)
        index = {"weight_map": {"a.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return fill


def _text(name: str, text: bytes) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        _header(_entry())(folder)
        (folder / name).write_bytes(text)

    return fill


def _sparse(folder: Path) -> None:
    _header(_entry())(folder)
    os.truncate(folder / "model.safetensors", 1 << 40)


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "model-1.safetensors")


def _many(count: int) -> bytes:
    return b"{" + b",".join(b'"%d":0' % i for i in range(count)) + b',"0":1}'


STREAMED = {
    "header: length beyond the file": (_header({}, b"", 2**63), "cut short"),
    "header: no JSON": (_header(b"\xff\xfe{}"), "is not JSON"),
    "header: 100,000 lists deep": (_header(b"[" * 100_000), "is not JSON"),
    "header: 200,000 keys, one twice": (_header(_many(200_000)), "has the key '0' twice"),
    "header: 30 MB of lists": (_header(b'{"a":[' + b"[]," * 10**7 + b"0]}"), "lists and objects"),
    "header: sizes whose product wraps": (
        _header(_entry(shape=[2**32, 2**32, 4])), "and its place has 16"
    ),
    "header: [2^62, 0]": (
        _header(_entry(shape=[2**62, 0], data_offsets=[0, 0]), b""), "without numbers sizes"
    ),
    "header: [0, 2^63]": (
        _header(_entry(shape=[0, 2**63], data_offsets=[0, 0]), b""), "without numbers sizes"
    ),
    "header: a hole": (_header(_entry(data_offsets=[4, 20]), b"\0" * 20), "behind a hole"),
    "header: an overlap": (_header({"a": F32, "b": F32}), "overlaps another tensor"),
    "header: an unknown type": (_header(_entry(dtype="F7")), "has the dtype F7"),
    "a file of 1 TiB that is none": (_sparse, "cut short or too long"),
    "a pipe for a file": (_pipe, "is no regular file"),
    "key: .weight": (_header({".weight": F32}), "'' among its names"),
    "key: training": (_header({"training": F32}), "'training' among its names"),
    "key: 5000 dots": (_header({"a." * 5000 + "b": F32}), "5001 names"),
    "key: a NUL": (_header({"a\0b": F32}), "control characters"),
    "index: ../": (_index("../model.safetensors"), "is no name of a file"),
    "index: /etc/passwd": (_index("/etc/passwd"), "is no name of a file"),
    "index: a number": (_index(5), "is no name of a file"),  # type: ignore[arg-type]
    "config: no JSON": (_text("config.json", b"{"), "config.json is not JSON"),
    "config: 30 MB of lists": (
        _text("config.json", b'{"a":[' + b"[]," * 10**7 + b"0]}"), "lists and objects"
    ),
    "config: quantized already": (_config(quantization_config={"a": 1}), "is quantized already"),
}  # fmt: skip
CASES |= {name: _streamed(*parts) for name, parts in STREAMED.items()}


def _loaded(change: Callable[[dict[str, Any]], Any], names: str) -> Callable[[], None]:
    """A saved folder whose document was changed and sealed again: refused, the model untouched."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as place:
            saved = Path(place, "saved")
            save_quantized(quantize_model(nn.Sequential(nn.Linear(64, 64)), "w4g32").model, saved)
            plain = json.loads((saved / "quantization.json").read_text())
            change(plain)
            (saved / "quantization.json").write_text(json.dumps(sealed(plain)))
            model = nn.Sequential(nn.Linear(64, 64))
            layer = model[0]
            message = _bounded(lambda: load_quantized(saved, model))
            assert names in message, message
            assert model[0] is layer and type(layer) is nn.Linear

    return run


def _renamed(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda plain: plain["files"].update({name: next(iter(plain["files"].values()))})


CASES |= {
    "document: of a later version": _loaded(lambda p: p.update(format_version=9), "version 9"),
    "document: a file elsewhere": _loaded(_renamed("../x"), "is no name of a file"),
    "document: a shape of 2^62 rows": _loaded(
        lambda p: p["layers"]["0"].update(shape=[2**62, 64]), "needs uint8"
    ),
    "document: a tie to nowhere": _loaded(lambda p: p["ties"].update(x="nowhere"), "cannot be"),
    "document: a layer that is none": _loaded(
        lambda p: p["layers"]["0"].update(kind="conv"), "needs a kind"
    ),
}


def _case_pattern() -> None:
    assert not is_named("a" * 60, "(a+)+b", "config.json")
    assert "takes too long" in _bounded(lambda: is_named("a" * 60, r"(a+)\1+(c+)+$", "x"))


def _case_bomb() -> None:
    """A pickle is never opened, and a tensor cannot be larger than its bytes."""
    with tempfile.TemporaryDirectory() as place:
        torch.save({"a.weight": torch.zeros(1).expand(1 << 30)}, f"{place}/model.bin")
        message = _bounded(lambda: quantize_checkpoint(place, f"{place}-new", "w4"))
    assert "has no safetensors files" in message, message


CASES |= {"config: a pattern that never ends": _case_pattern, "a pickle of 4 GiB": _case_bomb}
