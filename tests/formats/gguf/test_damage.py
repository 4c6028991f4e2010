"""Damaged GGUF files: an error that says what is wrong, in no time, and never a wrong model."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from quantization import pack_matrix
from quantization.checkpoint.disk.stored_tensor import StoredTensor
from quantization.checkpoint.stored_model import StoredLayer, StoredModel
from quantization.formats import FormatError
from quantization.formats.gguf import read_gguf, write_gguf
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "m.gguf"
    layer = StoredLayer.of(pack_matrix(torch.randn(8, 64), "w8g32+f16"))
    tensors = {"bias": StoredTensor.of(torch.randn(8)), "norm": StoredTensor.of(torch.randn(4, 3))}
    write_gguf(StoredModel({"layer": layer}, tensors), path, plain=True)
    return path.read_bytes()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    head = text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    return head + struct.pack("<IQ", kind, offset)


def value(key: str, kind: int, data: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + data


def made(
    tensors: list[bytes],
    values: list[bytes] = [],  # noqa: B006
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 4096,
) -> bytes:
    counts = counts or (len(tensors), len(values) + 1)
    values = [value("general.architecture", 8, text("odd")), *values]
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(values) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def read(content: bytes, tmp_path: Path) -> StoredModel:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    return read_gguf(path, plain=True)


def load_all(stored: StoredModel) -> None:
    for each in (*stored.layers.values(), *stored.tensors.values()):
        each.load()


def test_what_is_made_here_is_sound(tmp_path: Path) -> None:
    stored = read(made([tensor("a", (4, 2))]), tmp_path)
    assert stored.tensors["a"].shape == (2, 4) and stored.tensors["a"].load().sum() == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "does not start with b'GGUF'"),
        (b"PK\3\4" + bytes(99), "does not start with b'GGUF'"),
        (b"GGUF", "it ends at byte 4, and 4 bytes of its header should be at 4"),
        (made([], version=1), r"it is of version 1; versions \(2, 3\)"),
        (made([], version=4), "it is of version 4"),
        (made([], version=3 << 24), "it is of version 50331648"),
        (made([], counts=(0, 1 << 60)), "has 1152921504606846976 values of metadata, more than"),
        (made([], counts=(1 << 60, 1)), "has 1152921504606846976 tensors, more than"),
        (made([tensor("a", (4,)), tensor("a", (4,))]), "has the tensor a twice"),
        (made([], [value("k", 4, bytes(4))] * 2), "has the metadata k twice"),
        (made([], [value("k", 99, bytes(4))]), "metadata k is of the unknown type 99"),
        (made([], [value("k", 9, struct.pack("<IQ", 9, 1))]), "an array of the unknown type 9"),
        (made([], [value("k", 9, struct.pack("<IQ", 0, 1 << 62))]), "bytes of its header"),
        (
            made([], [value("k", 9, struct.pack("<IQ", 8, 1 << 62))]),
            "4611686018427387904 strings, more",
        ),
        (made([], [value("k", 8, struct.pack("<Q", 1 << 63))]), "bytes of its header should be"),
        (made([], [value("general.alignment", 4, struct.pack("<I", 24))]), "no power of two"),
        (made([], [value("general.alignment", 8, text("32"))]), "no power of two"),
        (made([tensor("a", (4,), kind=77)]), "tensor a is of the unknown type 77"),
        (made([tensor("a", (4,), kind=4)]), "tensor a is of the unknown type 4"),
        (made([tensor("a", (48,), kind=8)]), r"rows of the tensor a are no whole blocks of 32"),
        (made([tensor("a", (1,) * 5)]), "tensor a says that it has 5 dimensions"),
        (made([tensor("a", (1,) * 9000)]), "tensor a says that it has 9000 dimensions"),
        (made([tensor("a", (1 << 40, 1 << 40))]), "tensor a should end at byte"),
        (made([tensor("a", (1 << 63, 2))]), "tensor a should end at byte"),
        (made([tensor("a", (4,), offset=1 << 62)]), "tensor a should end at byte"),
        (made([tensor("a", (4,), offset=7)]), "tensor a is at 7, no multiple of 32"),
        (made([tensor("a", (16,)), tensor("b", (16,), offset=32)]), "a and b lie over each other"),
        (made([tensor("a", (4,))], data=8), "tensor a should end at byte"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2) + b"\xff\xfe" + bytes(99), "'utf-8' codec"),
    ],
)
def test_headers_that_lie(content: bytes, reason: str, tmp_path: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(FormatError, match=reason):
        read(content, tmp_path)
    assert time.perf_counter() - start < 2


def test_a_file_that_ends_anywhere(sound: bytes, tmp_path: Path) -> None:
    assert set(read(sound, tmp_path).layers) == {"layer"}
    ends = range(0, len(sound) - 32, max(len(sound) // 300, 1))
    for end in ends:
        with pytest.raises(FormatError):
            read(sound[:end], tmp_path)
    assert len(ends) > 200


def test_bytes_that_are_changed_anywhere(
    sound: bytes, tmp_path: Path, rng: np.random.Generator
) -> None:
    """A sound file, or an error of ours: nothing else, whichever byte of the header changes."""
    outcomes = {"read": 0, "refused": 0}
    header = sound.index(b"norm") + 32
    for place in rng.permutation(header)[:250]:
        content = bytearray(sound)
        content[place] ^= int(rng.integers(1, 256))
        try:
            load_all(read(bytes(content), tmp_path))
            outcomes["read"] += 1
        except FormatError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 100 and sum(outcomes.values()) == 250


@pytest.mark.parametrize(
    "told",
    [
        *("{", "[]", '{"layers": 3}', '"x"', '{"ties": "x"}', '{"ties": {"a": "nowhere"}}'),
        *('{"ties": {"nowhere": "a"}}', '{"ties": {"a": "b"}}', '{"ties": {"a": ["a"]}}'),
        *('{"ties": {"b": "nowhere", "a": "nowhere"}}', '{"ties": {"a.packed": "a.packed"}}'),
        '{"layers": {"a": {"kind": "tree", "dtype": "float32"}}}',
        *(
            f'{{"layers": {{"a": {{"kind": "linear", "dtype": "float32", "more": {more}}}}}}}'
            for more in (
                '"x"',
                "[]",
                '{"x": 1}',
                '{"padding_idx": "1"}',
                '{"padding_idx": true}',
                '{"was_conv1d": 1}',
            )
        ),
    ],
)
def test_what_a_plain_file_tells_of_its_layers(told: str, tmp_path: Path) -> None:
    two = [tensor("a", (4,)), tensor("b", (8,), offset=32)]
    content = made(two, [value("quantization.model", 8, text(told))])
    with pytest.raises(FormatError, match=r"metadata quantization\.model is damaged"):
        read(content, tmp_path)
