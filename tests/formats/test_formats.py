"""The table of formats, and the integers that they have in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from quantization import Mode, Scheme, pack_matrix, quantize_model
from quantization.checkpoint.stored_model import StoredLayer, StoredModel, stored_model
from quantization.formats import FORMATS, FormatError, reader, writer
from quantization.formats.integers import (
    Integers,
    integers_of,
    order_of,
    packed_of,
    why_not,
    width_of,
)
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

WHOLE = [
    *(f"w{bits}{span}{mode}" for bits in range(1, 9) for span in ("", "t", "g7") for mode in "sa"),
    *("binary", "binaryg16", "ternary", "ternaryg16", "w4g16+dq", "ternaryg16+dq", "w5g16a+dq"),
]
WHOLE = [name for name in WHOLE if not (name.startswith("w1") and name.endswith("s"))]


def test_every_row_of_the_table_has_its_functions() -> None:
    for name, (_, reads, writes) in FORMATS.items():
        for able, find in ((reads, reader), (writes, writer)):
            if able:
                assert callable(find(name))
            else:
                with pytest.raises(
                    ValueError, match=f"'{name}' is none of the formats that can be"
                ):
                    find(name)
    with pytest.raises(ValueError, match=r"can be written: compressed-tensors, .*onnx"):
        writer("pickle")


@pytest.mark.parametrize("name", WHOLE)
def test_integers_stand_for_the_same_numbers(name: str, rng: np.random.Generator) -> None:
    packed = pack_matrix(torch.from_numpy(rng.normal(size=(5, 33))).float(), name)
    scheme = packed.scheme
    assert why_not(scheme) is None
    least = width_of(scheme, range(2, 9))
    for bits in range(least, 9):
        found = integers_of(packed, bits)
        place = np.arange(33) // scheme.group(33)
        zeros = found.zero_points
        zero = np.float64(1 << bits - 1) if zeros is None else zeros.double().numpy()[:, place]
        codes = found.codes.double().numpy()
        assert codes.min() >= 0 and codes.max() < 1 << bits
        exact = (codes - zero) * found.scales.double().numpy()[:, place]
        np.testing.assert_array_equal(exact.astype("float32"), packed.dequantize("float32"))


@pytest.mark.parametrize("mode", ["s", "a"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_integers_is_the_way_back(bits: int, mode: str, rng: np.random.Generator) -> None:
    for span in ("", "g7", "g32"):
        for shape in ((1, 1), (5, 33), (9, 64)):
            weight = torch.from_numpy(rng.normal(size=shape)).bfloat16()
            packed = pack_matrix(weight, f"w{bits}{span}{mode}")
            again = packed_of(integers_of(packed, bits), packed.scheme, "bfloat16")
            for part in ("packed_weights", "scales", "zero_points"):
                mine, other = getattr(packed, part), getattr(again, part)
                assert mine is other is None or torch.equal(mine, other)


def test_integers_that_are_none_are_told() -> None:
    for name in ("nf4", "fp4", "mxfp4", "kmeans2"):
        assert "places in a table of levels" in str(why_not(Scheme.parse(name)))
    assert why_not(Scheme.parse("w4af")) == "its zero points are floats, not whole numbers"
    with pytest.raises(FormatError, match="on meta"):
        integers_of(pack_matrix(torch.empty(2, 2, device="meta"), "w4"), 4)


def test_order_of() -> None:
    def order(*places: int) -> tuple[list[int] | None, list[int] | None]:
        found = order_of(torch.tensor(places), 2, 2, "a.g_idx")
        parts = (found.groups, found.columns)
        return tuple(None if part is None else part.tolist() for part in parts)

    assert order(0, 0, 1, 1) == order(0, 0, 1) == order() == (None, None)
    assert order(1, 1, 0, 0) == ([1, 0], None) and order(1, 1, 1, 1) == ([1, 1], None)
    assert order(0, 1, 0, 1) == (None, [0, 2, 1, 3]) and order(1, 0, 0) == (None, [1, 2, 0])
    for uneven in ((0, 0, 0, 1), (1, 0, 1), (0, 1, 1)):
        with pytest.raises(FormatError, match=r"a.g_idx gives groups other sizes than 2 columns"):
            order(*uneven)
    for outside in ((0, 0, 2, 2), (-1, -1, 0, 0)):
        with pytest.raises(FormatError, match=r"a.g_idx names a group that is none of the 2"):
            order(*outside)


def test_formats_can_be_chained(tmp_path: Path, rng: np.random.Generator) -> None:
    """From a GPTQ model to one that vLLM serves, without a float weight."""
    from tests.formats.foreign_oracle import gptq_tensors, write_folder

    codes = rng.integers(0, 16, (64, 32))
    zeros = rng.integers(1, 16, (2, 32))
    scales = rng.uniform(0.1, 1, (2, 32)).astype(np.float16)
    tensors = gptq_tensors(codes, zeros, scales, np.arange(64) // 32, 4, 1)
    settings = {"bits": 4, "group_size": 32, "quant_method": "gptq"}
    write_folder(tmp_path / "gptq", {"up": tensors}, settings, config={"dtype": "float16"})
    source = reader("gptq")(tmp_path / "gptq")
    writer("compressed-tensors")(source, tmp_path / "ct")
    found = reader("compressed-tensors")(tmp_path / "ct").layers["up"].load()
    packed = source.layers["up"].load()
    assert packed.scheme == found.scheme == Scheme.parse("w4g32a")
    assert torch.equal(packed.dequantize(), found.dequantize())
    assert packed.scheme.mode is Mode.Asymmetric


def test_integers_of_layers_that_a_model_holds() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 8))
    quantize_model(model, "int8")
    stored = stored_model(model)
    assert isinstance(stored, StoredModel) and isinstance(stored.layers["0"], StoredLayer)
    found = integers_of(stored.layers["0"].load(), 8)
    assert isinstance(found, Integers) and found.codes.shape == (8, 64)
