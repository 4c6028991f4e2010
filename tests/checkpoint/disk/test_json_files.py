"""JSON that lies: keys twice, bombs, files that are none."""

from __future__ import annotations

import doctest
import os
import time
import tracemalloc
from pathlib import Path

import pytest

pytest.importorskip("torch")

from quantization.checkpoint.disk import json_files
from quantization.checkpoint.disk.json_files import CheckpointError, parse_json, read_json
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(json_files).failed == 0


def test_a_key_twice_is_found_at_once() -> None:
    text = "{" + ",".join(f'"{i}":0' for i in range(100_000)) + ',"99999":1}'
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match="has the key '99999' twice"):
        parse_json(text.encode(), "x")
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("part", [b"[],", b"0,", b'{"":0},', b'"a",'])
def test_a_bomb_is_refused_before_it_goes_off(part: bytes) -> None:
    text = b'{"a":[' + part * 9_000_000 + b"0]}"
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="more than any checkpoint needs"):
            parse_json(text, "x")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_only_files_of_a_size_for_json_are_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"JSON of at most 100000000 bytes is read"):
        read_json(tmp_path / "large")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe is no regular file"):
        read_json(tmp_path / "pipe")
