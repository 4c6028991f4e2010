"""AutoRound's settings and packings, and GPTQModel's planes of bits, against packers in NumPy."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from quantization.formats import FormatError
from quantization.formats.awq import read_awq
from quantization.formats.gptq import read_gptq
from tests.formats.foreign_oracle import (
    awq_tensors,
    awq_words,
    gptq_tensors,
    gptq_words,
    numbers,
    planar_words,
    stream_words,
    wide_awq_words,
    write_folder,
)
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

Made = tuple[dict[str, torch.Tensor], np.ndarray]


def layer_of(
    rng: np.random.Generator, bits: int, form: str, sym: bool = False, scatter: bool = False
) -> Made:
    """A layer [32, 96] in groups of 32 as it is packed in a form, and its weight."""
    places = np.arange(96) // 32
    places = rng.permutation(places) if scatter else places
    codes, scales = rng.integers(0, 2**bits, (96, 32)), rng.uniform(0.01, 1, (3, 32))
    scales, zeros = scales.astype(np.float16), rng.integers(1, 2**bits, (3, 32))
    zeros = np.full_like(zeros, 1 << bits - 1) if sym else zeros
    weight = numbers(codes, zeros, scales, places)
    if form == "awq":
        pack = awq_words if bits == 4 else partial(wide_awq_words, bits=bits)
        return awq_tensors(codes, zeros, scales, pack), weight
    pack = planar_words if form == "planar" else stream_words
    version = 1 if form == "less one" else 2
    tensors = gptq_tensors(codes, zeros, scales, places, bits, version, pack)
    if form != "planar" and not scatter:
        del tensors["g_idx"]  # AutoRound has none
    return tensors, weight


def settings(bits: int, packing: str | None = None, **more: Any) -> dict[str, Any]:
    plain = {"quant_method": "auto-round", "bits": bits, "group_size": 32, "sym": True}
    return plain | ({} if packing is None else {"packing_format": packing}) | more


def check(layer: Any, weight: np.ndarray) -> None:
    found = layer.load().dequantize("float64").numpy()
    np.testing.assert_array_equal(found, weight.astype(np.float32))


def test_the_packers_agree_where_they_must(rng: np.random.Generator) -> None:
    for bits in (2, 3, 4, 8):
        codes = rng.integers(0, 2**bits, (2, 64))
        np.testing.assert_array_equal(stream_words(codes, bits), gptq_words(codes, bits))
        if bits != 3:
            np.testing.assert_array_equal(planar_words(codes, bits), gptq_words(codes, bits))
    codes = rng.integers(0, 16, (2, 64))
    np.testing.assert_array_equal(wide_awq_words(codes, 4), awq_words(codes))


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("packing", "form"),
    [
        ("auto_round:auto_gptq", "less one"),
        ("auto_round:gptq:exllamav2", "less one"),
        (None, "less one"),
        ("auto_round", "as they are"),
        ("auto_round:exllamav2", "as they are"),
        ("auto_round:gptqmodel", "as they are"),
    ],
)
def test_gptq_packings(
    packing: str | None, form: str, bits: int, sym: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors, weight = layer_of(rng, bits, form, sym)
    stored = read_gptq(write_folder(tmp_path, {"a": tensors}, settings(bits, packing), config={}))
    check(stored.layers["a"], weight)
    assert str(stored.layers["a"].scheme) == f"w{bits}g32" + ("" if sym else "a")


def test_settings_that_are_repeated_in_a_file_stay_behind(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors, _ = layer_of(rng, 4, "less one")
    folder = write_folder(tmp_path, {"a": tensors}, settings(4), config={})
    for name in ("quantization_config.json", "quantize_config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    assert [asset.name for asset in read_gptq(folder).assets] == ["tokenizer.json"]


@pytest.mark.parametrize("bits", [4, 5, 6, 7])
def test_awq_packings(bits: int, tmp_path: Path, rng: np.random.Generator) -> None:
    tensors, weight = layer_of(rng, bits, "awq")
    made = settings(bits, "auto_round:auto_awq", sym=False, data_type="int", act_bits=16)
    folder = write_folder(tmp_path, {"a": tensors}, made, config={})
    check(read_awq(folder).layers["a"], weight)
    with pytest.raises(FormatError, match=r"packed by AutoRound as AWQ is: read it as 'awq'"):
        read_gptq(folder)
    folder = write_folder(tmp_path / "b", {"a": tensors}, settings(bits), config={})
    with pytest.raises(FormatError, match=r"packed by AutoRound as GPTQ is: read it as 'gptq'"):
        read_awq(folder)


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_planes_of_gptqmodel(
    bits: int, scatter: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors, weight = layer_of(rng, bits, "planar", scatter=scatter)
    made = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": "gptq_p"}
    folder = write_folder(tmp_path, {"a": tensors}, made | {"desc_act": scatter})
    layer = read_gptq(folder).layers["a"]
    check(layer, weight)
    assert layer.scheme.input_order == scatter
    x = torch.randn(2, 96, dtype=torch.float64)
    exact = x @ torch.from_numpy(weight.astype(np.float32)).double().T
    torch.testing.assert_close(layer.module()(x), exact, rtol=1e-12, atol=1e-12)


def test_single_layers_have_settings_of_their_own(tmp_path: Path, rng: np.random.Generator) -> None:
    wide, wide_weight = layer_of(rng, 8, "less one")
    narrow, narrow_weight = layer_of(rng, 3, "less one")
    extra = {
        "0.up": {"bits": 3, "data_type": "int"},
        r"1\..*": {"bits": 3},
        "lm_head": {"bits": 16},
    }
    made = settings(8, extra_config=extra)
    again = {part: tensor.clone() for part, tensor in narrow.items()}
    layers = {"0.up": narrow, "0.down": wide, "1.up": again}
    stored = read_gptq(write_folder(tmp_path, layers, made, config={}))
    for name, weight in (("0.up", narrow_weight), ("0.down", wide_weight), ("1.up", narrow_weight)):
        check(stored.layers[name], weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing_format": "auto_round:fp8_static"}, "packed as 'auto_round:fp8_static'"),
        ({"packing_format": "auto_round:gptq:marlin"}, "packed as 'auto_round:gptq:marlin'"),
        ({"packing_format": "mlx"}, "packed as 'mlx'"),
        ({"packing_format": 3}, "packing_format of the quantization settings is 3"),
        ({"backend": "auto_round:marlin"}, "packed as 'auto_round:marlin'"),
        ({"data_type": "mx_fp"}, "the model has data_type 'mx_fp'; 'int' is read"),
        ({"act_bits": 8}, "has activations of 8 bits"),
        ({"super_bits": 6}, "quantized with super_bits"),
        ({"rotation_config": {"type": "hadamard"}}, "quantized with rotation_config"),
        ({"extra_config": {"a": {"bits": 16}}}, "a has 16 bits; allowed are"),
        ({"extra_config": {"a": {"data_type": "fp"}}}, "a has data_type 'fp'"),
        ({"extra_config": {"a": 4}}, "extra_config of a is no object"),
        ({"extra_config": {"(": {}}}, "is no regular expression"),
        ({"group_size": 0}, "group_size 0"),
        ({"bits": 9}, "a has 9 bits"),
    ],
)
def test_what_is_more_than_packed_integers_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    tensors, _ = layer_of(rng, 4, "less one")
    folder = write_folder(tmp_path, {"a": tensors}, settings(4) | change, config={})
    with pytest.raises(FormatError, match=message):
        read_gptq(folder)


def test_planes_have_whole_blocks(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors, _ = layer_of(rng, 5, "planar")
    tensors["scales"] = tensors["scales"][:, :16].contiguous()
    tensors["qweight"] = tensors["qweight"][:, :16].contiguous()
    made = {"quant_method": "gptq", "bits": 5, "group_size": 32, "checkpoint_format": "gptq_p"}
    layer = read_gptq(write_folder(tmp_path, {"a": tensors}, made)).layers["a"]
    assert layer.shape == (16, 96)  # codes of a block that is not full
    tensors["qweight"] = tensors["qweight"][:-1].contiguous()
    del tensors["g_idx"]
    with pytest.raises(FormatError, match=r"a\.qweight has shape \(14, 16\)"):
        read_gptq(write_folder(tmp_path, {"a": tensors}, made))
