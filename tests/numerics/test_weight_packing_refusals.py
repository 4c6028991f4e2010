"""What packing refuses, in which words, and the checks that a caller may add."""

from __future__ import annotations

import re

import numpy as np
import pytest

from quantization.weight_pack import (
    Packing,
    get_dtype_size_in_bits,
    pack_weights,
    unpack_weights,
)
from tests.numerics.packing_calls import codes_of
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

# ---- ensure_methods --------------------------------------------------------------------------


def test_ensure_methods_run_first_and_may_refuse() -> None:
    seen = []
    codes = codes_of(2, (4, 4))
    pack_weights(codes, 2, ensure_methods=[seen.append, lambda a: a.flags.c_contiguous])
    assert seen[0] is codes
    with pytest.raises(ValueError, match=r"^to_pack_2d is refused by is_small, one of ensure_meth"):
        pack_weights(codes.astype(float), 99, ensure_methods=[is_small])
    with pytest.raises(ValueError, match=r"^packed is refused by is_small"):
        unpack_weights(codes, 2, [is_small])
    with pytest.raises(KeyError):
        pack_weights(codes, 2, ensure_methods=(lambda a: {}["missing"],))
    with pytest.raises(TypeError, match=r"list of callables, not function; write \[method\]"):
        pack_weights(codes, 2, ensure_methods=is_small)
    with pytest.raises(TypeError, match="ensure_methods holds 3, which cannot be called"):
        pack_weights(codes, 2, ensure_methods=[3])
    pytest.importorskip("torch")
    import torch

    tensor = torch.from_numpy(codes)
    pack_weights(tensor, 2, torch.uint8, [torch.Tensor.is_contiguous])
    with pytest.raises(ValueError, match="refused by is_contiguous"):
        pack_weights(tensor.T, 2, torch.uint8, [torch.Tensor.is_contiguous])
    with pytest.raises(ValueError, match="refused by"):
        pack_weights(tensor, 2, ensure_methods=[lambda t: (t < 3).all()])


def is_small(array) -> np.bool_:
    return np.bool_(array.size < 4)


# ---- refusals --------------------------------------------------------------------------------

TWO = np.zeros((4, 4), np.uint8)

REFUSALS = {
    "a list": (lambda: pack_weights([[1]], 2), TypeError,
        "to_pack_2d must be a torch.Tensor or numpy.ndarray, not list"),
    "floats": (lambda: pack_weights(TWO.astype("f4"), 2), TypeError,
        "dtype of to_pack_2d is float32; allowed are bool, uint8, uint16, uint32, uint64, int8, "
        "int16, int32, int64"),
    "a vector": (lambda: pack_weights(TWO[0], 2), ValueError,
        "to_pack_2d has shape (4,); expected 2 dimensions: reshape it first"),
    "no width": (lambda: pack_weights(TWO, 0), ValueError, "pack_bits must be 1..8, not 0"),
    "9 bits": (lambda: unpack_weights(TWO, 9), ValueError, "pack_bits must be 1..8, not 9"),
    "bits a float": (lambda: pack_weights(TWO, 2.0), TypeError,
        "pack_bits must be an integer, not 2.0"),
    "bits a bool": (lambda: pack_weights(TWO, True), TypeError,
        "pack_bits must be an integer, not True"),
    "a container of floats": (lambda: pack_weights(TWO, 2, "float32"), TypeError,
        "dtype is float32; allowed are uint8, uint16, uint32, uint64, int8, int16, int32, int64"),
    "no dtype": (lambda: pack_weights(TWO, 2, "nibble"), TypeError,
        "'nibble' is not a dtype; give a torch dtype, a NumPy dtype or a name such as 'int8'"),
    "a layout": (lambda: pack_weights(TWO, 2, layout="tight"), ValueError,
        "layout 'tight' does not exist; allowed are aligned, dense, base3"),
    "a dim": (lambda: pack_weights(TWO, 2, dim=2), ValueError,
        "dim must be 0 (down the columns) or 1 (along the rows), not 2"),
    "a dim back": (lambda: unpack_weights(TWO, 2, dim=0.0), TypeError,
        "dim must be an integer, not 0.0"),
    "too large": (lambda: pack_weights(np.array([[0, 1], [7, 5]]), 2), ValueError,
        "to_pack_2d[1, 0] = 7 does not fit in 2 bits: allowed are 0..3; use pack_bits=3 or smaller "
        "codes"),
    "too small": (lambda: pack_weights(np.array([[0, -5]]), 3), ValueError,
        "to_pack_2d[0, 1] = -5 does not fit in 3 bits: allowed are -4..3, as some values are "
        "negative; use pack_bits=4 or smaller codes"),
    "mixed": (lambda: pack_weights(np.array([[-1, 3]]), 2), ValueError,
        "to_pack_2d[0, 1] = 3 does not fit in 2 bits: allowed are -2..1, as some values are "
        "negative; use pack_bits=3 or smaller codes"),
    "huge": (lambda: pack_weights(np.array([[2**64 - 1]], "u8"), 8), ValueError,
        "to_pack_2d[0, 0] = 18446744073709551615 does not fit in 8 bits: allowed are 0..255; use "
        "smaller codes"),
    "ternary": (lambda: pack_weights(TWO + 3, 2, layout="base3"), ValueError,
        "to_pack_2d[0, 0] = 3 does not fit in a ternary digit: allowed are 0..2; use smaller "
        "codes"),
    "ternary width": (lambda: pack_weights(TWO, 3, layout="base3"), ValueError,
        "layout 'base3' packs ternary codes: pack_bits must be 2, not 3"),
    "ternary container": (lambda: pack_weights(TWO, 2, "int32", layout="base3"), TypeError,
        "layout 'base3' packs into uint8 or int8, not int32"),
    "packed floats": (lambda: unpack_weights(TWO.astype("f8"), 2), TypeError,
        "dtype of packed is float64; allowed are uint8, uint16, uint32, uint64, int8, int16, "
        "int32, int64"),
    "packed bools": (lambda: unpack_weights(TWO.astype(bool), 2), TypeError,
        "dtype of packed is bool; allowed are uint8, uint16, uint32, uint64, int8, int16, int32, "
        "int64"),
    "bool out": (lambda: unpack_weights(TWO, 2, dtype=bool), ValueError,
        "dtype bool holds codes of 1 bit, not of 2; use uint8"),
    "float out": (lambda: unpack_weights(TWO, 2, dtype="float32"), TypeError,
        "dtype is float32; allowed are bool, uint8, uint16, uint32, uint64, int8, int16, int32, "
        "int64"),
    "too long": (lambda: unpack_weights(TWO, 2, size=17), ValueError,
        "size=17 is not a length of 4 containers along dim 0; they hold 13..16 codes of 2 bits in "
        "layout 'aligned'"),
    "too short": (lambda: unpack_weights(TWO, 3, layout="dense", dim=1, size=7), ValueError,
        "size=7 is not a length of 4 containers along dim 1; they hold 9..10 codes of 3 bits in "
        "layout 'dense'"),
    "info and size": (lambda: unpack_weights(TWO, INFO, size=16), ValueError,
        "a Packing says layout, dim and size; leave those arguments out"),
    "info and shape": (lambda: unpack_weights(TWO[:3], INFO), ValueError,
        "packed is uint8 of shape (3, 4), but this Packing has uint8 of shape (4, 4)"),
    "info and container": (lambda: unpack_weights(TWO.astype("u2"), INFO), ValueError,
        "packed is uint16 of shape (4, 4), but this Packing has uint8 of shape (4, 4)"),
    "masked": (lambda: pack_weights(np.ma.masked_array(TWO), 2), TypeError,
        "to_pack_2d must be a torch.Tensor or numpy.ndarray, not MaskedArray"),
    "no ternary byte": (lambda: unpack_weights(TWO + 243, 2, layout="base3"), ValueError,
        "packed[0, 0] is the byte 243; five ternary codes make 0..242: pass what pack_weights "
        "packed with layout='base3'"),
    "info of no shape": (lambda: Packing(2, "aligned", 0, "uint8", 5, False), TypeError,
        "shape must be (rows, cols), not 5"),
    "no width of a type": (lambda: get_dtype_size_in_bits("int0"), TypeError,
        "int0 is not a number type; give one such as uint8 or float32"),
    "no numbers": (lambda: get_dtype_size_in_bits("str"), TypeError,
        "str is not a number type; give one such as uint8 or float32"),
}  # fmt: skip
INFO = Packing(2, "aligned", 0, "uint8", (16, 4), False)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_what_is_wrong_and_what_is_allowed(name) -> None:
    call, error, message = REFUSALS[name]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def test_meta_tensors_are_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="to_pack_2d is on the meta device"):
        pack_weights(torch.zeros(4, 4, dtype=torch.uint8, device="meta"), 2)
