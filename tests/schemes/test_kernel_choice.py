"""Which kernel a call of some size would run is told, and sizes that are none are refused."""

from __future__ import annotations

import pytest

from quantization.schemes.kernel_choice import linear_kernel
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)


def test_the_kernel_of_a_call_is_told(isa: str) -> None:
    kernel = linear_kernel(3, 48, 64, "bfloat16")
    assert (kernel.isa, kernel.dtype, kernel.tokens, kernel.chunk) == (isa, "bfloat16", 3, 3)
    assert str(kernel).startswith(f"{isa}: 3 tokens of bfloat16, tiles of ")
    for arguments, message in [
        ((0, 1, 1), "tokens is 0; it must be 1 or more"),
        ((1, 0, 1), "out_features is 0; it must be 1 or more"),
        ((1, 1, -1), "in_features is -1; it must be 0 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_kernel(*arguments)
    with pytest.raises(TypeError, match="int8"):
        linear_kernel(1, 1, 1, "int8")
