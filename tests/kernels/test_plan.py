"""The plan of a linear call, as `choose_linear` tells it: tiles, chunks, threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from quantization import _kernels
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

FLOAT32, BFLOAT16 = _kernels.FLOAT32, _kernels.BFLOAT16


@pytest.fixture
def threads() -> Iterator[int]:
    _kernels.set_num_threads(4)
    yield 4
    _kernels.set_num_threads(0)


def test_the_active_isa_is_named(isa: str) -> None:
    assert _kernels.choose_linear(1, 64, 64, FLOAT32, 8, 0, 0, 0)[0] == isa


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 18, 19, 263, 264, 265, 5000])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, _kernels.FLOAT16, _kernels.FLOAT64])
def test_tiles_and_chunks_fit_the_tokens(isa: str, dtype: int, tokens: int) -> None:
    _, rows, cols, chunk, used, packed = _kernels.choose_linear(
        tokens, 1000, 999, dtype, 8, 0, 0, 0
    )
    assert 1 <= rows <= min(tokens, 8) and 1 <= cols <= 8
    assert chunk == tokens if tokens <= 264 else tokens / 264 <= chunk <= 264
    assert 1 <= used <= _kernels.get_num_threads()
    assert not packed or (isa == "avx512bf16" and dtype == BFLOAT16)


def test_weights_are_packed_for_many_bfloat16_tokens_only(isa: str) -> None:
    packed = [
        _kernels.choose_linear(n, 4096, 4096, BFLOAT16, 8, 0, 0, 0)[5] for n in (1, 18, 19, 512)
    ]
    assert packed == ([False, False, True, True] if isa == "avx512bf16" else [False] * 4)
    assert not _kernels.choose_linear(512, 4096, 4096, FLOAT32, 8, 0, 0, 0)[5]


def test_small_calls_wake_no_threads(threads: int) -> None:
    used = [_kernels.choose_linear(1, n, n, FLOAT32, 8, 0, 0, 0)[4] for n in (16, 64, 256, 2048)]
    assert used[0] == used[1] == 1 and used[-1] == threads
    assert used == sorted(used)


def test_more_tokens_are_worth_more_threads(threads: int) -> None:
    used = [_kernels.choose_linear(n, 96, 512, FLOAT32, 8, 0, 0, 0)[4] for n in (1, 16, 256)]
    assert used == sorted(used) and used[-1] > 1


@pytest.mark.parametrize("sizes", [(0, 4, 4), (4, 0, 4)])
def test_nothing_to_do_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError):
        _kernels.choose_linear(*sizes, FLOAT32, 8, 0, 0, 0)
    with pytest.raises(TypeError):
        _kernels.choose_linear(1, 4, 4, _kernels.INT8, 8, 0, 0, 0)


@pytest.mark.parametrize("bits", range(9))
@pytest.mark.parametrize("group", [3, 32, 64, 5000])
def test_packed_weights_have_tiles_too(isa: str, bits: int, group: int) -> None:
    for tokens in (1, 2, 5, 40, 600):
        _, rows, cols, *_ = _kernels.choose_linear(tokens, 100, 999, FLOAT32, bits, group, 0, 0)
        assert 1 <= rows <= min(tokens, 8) and 1 <= cols <= 8
