"""Each weight and each byte explained: flip what is named, and what is named changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from quantization import PackedWeights, Scheme, explain, explain_byte, pack_matrix
from quantization.inspection.explain_byte import HeldBits
from quantization.schemes.packed_weights import PARTS
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

ROWS, COLS = 2, 19
SCHEMES = [
    *("w2g8", "w3t", "w8", "w1g8a", "w5g8a", "w3g7af", "w4g8af+dqs", "w5g8af+dq", "w4g8a+dq"),
    *("nf4g16", "fp4g16+dq", "mxfp4", "kmeans2r", "kmeans4g8", "binaryg8", "ternaryg8+dq"),
    *("table(-3,-1,0,2.5)g8", "w3g8af+dq+order+cols", "nf4+f16+cols"),
]  # fmt: skip
OTHERS = [
    *(f"w{bits}{end}" for bits in range(2, 9) for end in ("", "g8a", "g5af", "g8a+order+cols")),
    *(f"kmeans{bits}{end}" for bits in range(1, 9) for end in ("", "r")),
    *("w1a", "w1g3af", "w6t", "nf4+dq", "fp4", "binary", "ternary", "w8g8af+dq", "mxfp4+cols"),
]  # fmt: skip
ALL = [*SCHEMES, *(pytest.param(name, marks=pytest.mark.deep) for name in OTHERS)]


def packed_of(name: str) -> PackedWeights:
    """A matrix under a scheme, its columns out of order and multiplied where that may be."""
    rng = np.random.default_rng(7)
    scheme = Scheme.parse(name)
    weight = rng.normal(size=(ROWS, COLS)).astype("float32")
    packed = pack_matrix(weight, scheme)
    if scheme.input_order:
        packed = replace(packed, input_order=rng.permutation(COLS).astype("int32"))
    if scheme.input_scale:
        packed = replace(packed, input_scale=rng.uniform(0.5, 2, COLS).astype("float32"))
    return packed


def changed(packed: PackedWeights, part: str, data: dict[int, int]) -> np.ndarray:
    """Which codes or numbers are others once bytes of a part are."""
    tensor = np.ascontiguousarray(getattr(packed, part)).copy()
    flat = tensor.reshape(-1).view("uint8")
    for offset, byte in data.items():
        flat[offset] = byte
    other = replace(packed, **{part: tensor})
    if part == "packed_weights":
        return packed.codes != other.codes
    with np.errstate(all="ignore"):
        before, after = packed.dequantize(), other.dequantize()
    return ~np.isclose(before, after, rtol=0, atol=0, equal_nan=True)


def flipped(place: Any) -> dict[int, int]:
    """Bytes in which every bit that a number owns is another; or its digit is."""
    if place.digit is None:
        pairs = zip(place.data, place.masks, strict=True)
        return {place.offset + i: byte ^ mask for i, (byte, mask) in enumerate(pairs)}
    (byte,), power = place.data, 3**place.digit
    digit = byte // power % 3
    return {place.offset: byte + ((digit + 1) % 3 - digit) * power}


@pytest.mark.parametrize("name", ALL)
def test_the_bits_of_a_weight_are_its_own(name: str) -> None:
    packed = packed_of(name)
    values = packed.dequantize()
    for row in range(ROWS):
        for col in range(COLS):
            told = explain(packed, row, col)
            assert told.value == values[row, col]
            assert told.code == packed.codes[row, col]
            wanted = (told.level - told.zero_point) * told.scale * told.multiplier
            assert told.value == pytest.approx(wanted, rel=1e-5)
            (place,) = [part.place for part in told.parts if part.name == "code"]
            assert place is not None
            found = np.argwhere(changed(packed, "packed_weights", flipped(place)))
            assert found.tolist() == [[row, col]]


@pytest.mark.parametrize("name", ALL)
def test_every_byte_is_explained_and_moves_only_what_it_holds(name: str) -> None:
    packed = packed_of(name)
    for part in PARTS:
        tensor = getattr(packed, part)
        if tensor is None:
            continue
        for offset in range(tensor.nbytes):
            told = explain_byte(packed, offset, part)
            assert told.value == tensor.reshape(-1).view("uint8")[offset]
            mask = 0
            for held in told.held:
                mask |= held.mask
                _moves_only_its_own(packed, part, offset, told.value, held)
            assert mask == 0xFF


def _moves_only_its_own(
    packed: PackedWeights, part: str, offset: int, value: int, held: HeldBits
) -> None:
    own = np.zeros((ROWS, COLS), bool)
    own[np.ix_(list(held.rows), list(held.cols))] = True
    if held.code is not None:
        own &= packed.codes == held.code
    if part == "input_order" or "base 3" in held.words:
        return  # no order once a bit is another; digits have their own test
    found = changed(packed, part, {offset: value ^ held.mask})
    assert not (found & ~own).any()
    if part == "packed_weights":
        assert (found == own).all()


@pytest.mark.parametrize("name", ALL)
def test_there_and_back(name: str) -> None:
    packed = packed_of(name)
    for part in explain(packed, 1, 13).parts:
        if part.place is not None:
            held = explain_byte(packed, part.place.offset, part.place.buffer).held
            assert any(1 in each.rows and 13 in each.cols for each in held), part


def test_padding_says_so() -> None:
    packed = pack_matrix(np.ones((2, 3), "float32"), "w3")
    assert [held.what for held in explain_byte(packed, 1).held] == ["code", "padding"]
    assert "bits 1..7: padding, of no weight" in str(explain_byte(packed, 1))
    ternary = pack_matrix(np.ones((2, 6), "float32"), "ternary")
    assert [held.what for held in explain_byte(ternary, 3).held] == ["code"] + 4 * ["padding"]
    zeros = pack_matrix(np.ones((2, 6), "float32"), "w3g2a")
    assert [held.what for held in explain_byte(zeros, 1, "zero_points").held][-1] == "padding"


def test_a_reference_is_compared() -> None:
    weight = np.array([[-8.0, 2.6, 1.0]], "float32")
    told = explain(pack_matrix(weight, "w4"), 0, 1, reference=weight)
    assert told.reference == pytest.approx(2.6)
    assert (told.code, told.nearest) == (2, 2)
    assert told.quotient == pytest.approx(2.6 / told.scale)
    assert told.error == pytest.approx(told.value - 2.6, abs=1e-6)
    packed = pack_matrix(weight, "w4")
    packed.packed_weights[0, 0] ^= 0b0001_0000
    worse = explain(packed, 0, 1, reference=weight)
    assert "the nearest level is that of code 2" in str(worse)


def test_what_cannot_be_explained_is_told() -> None:
    packed = packed_of("w4g8a")
    for wrong, words in (
        (lambda: explain(packed, 2, 0), "row is 2; the weight has 0..1"),
        (lambda: explain(packed, 0, -1), "col is -1; the weight has 0..18"),
        (lambda: explain_byte(packed, 20), "offset is 20; packed_weights has 0..19"),
        (lambda: explain_byte(packed, 0, "bias"), r"there are codes \(in packed_weights\), scales"),
        (lambda: explain(packed, 0, 0, reference=np.ones(3)), r"shape \(3,\); the weight has"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
    with pytest.raises(TypeError, match="int is no quantized layer"):
        explain(3, 0, 0)
    with pytest.raises(TypeError, match="reference is a str"):
        explain(packed, 0, 0, reference="w")


def test_it_is_drawn_without_scripts_or_colours() -> None:
    packed = packed_of("w3g7af")
    for told in (explain(packed, 1, 2), explain_byte(packed, 4), explain_byte(packed, 4, "scales")):
        html = told._repr_html_()
        assert "<svg" in html and "currentColor" in html and str(told).splitlines()[0] in html
        assert not any(word in html for word in ("<script", "style=", "#"))
