"""Scheme: a value that matches, hashes, pickles, prints and reads itself, and knows its bytes."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import re

import pytest

from quantization.numerics.granularity import Granularity
from quantization.numerics.parameters import Mode
from quantization.schemes.scheme import Scheme, scheme_of
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

GROUP = Granularity.PerGroup
TYPES = ("float32", "float64", "float16", "bfloat16")


def every_scheme() -> list[Scheme]:
    """All combinations of a few choices for each field that make a scheme."""
    found = []
    for bits, granularity, mode, grid, zero_point, scale_dtype, double_quant in itertools.product(
        range(1, 9),
        (Granularity.PerTensor, Granularity.PerDimension(1), GROUP(32), GROUP(7)),
        Mode,
        ("integer", "nf4", "fp4", "mxfp4", "kmeans", "binary", "ternary"),
        ("integer", "float"),
        (None, *TYPES),
        (False, True),
    ):
        try:
            found.append(
                Scheme(bits, granularity, mode, grid, zero_point, scale_dtype, double_quant)
            )
        except ValueError:
            continue
    return found


SCHEMES = every_scheme()


def test_there_are_as_many_schemes_as_the_rules_say() -> None:
    spans_and_scales = 4 * 5 + 2  # granularities times types, and groups double quantized
    integer = (7 + 8 + 8) * spans_and_scales  # symmetric, integer and float zero points
    tables = (1 + 1 + 8 + 1 + 1) * spans_and_scales  # nf4, fp4, kmeans, binary, ternary
    assert len(SCHEMES) == len(set(SCHEMES)) == integer + tables + 1


@pytest.mark.parametrize("way", ["name", "repr", "json", "pickle", "copy"])
def test_every_scheme_comes_back(way: str) -> None:
    ways = {
        "name": lambda scheme: Scheme.parse(str(scheme)),
        "repr": lambda scheme: eval(repr(scheme)),
        "json": lambda scheme: Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))),
        "pickle": lambda scheme: pickle.loads(pickle.dumps(scheme)),
        "copy": copy.deepcopy,
    }
    for scheme in SCHEMES:
        back = ways[way](scheme)
        assert back == scheme and hash(back) == hash(scheme), scheme


def test_names_differ() -> None:
    assert len({str(scheme) for scheme in SCHEMES}) == len(SCHEMES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("w8", "Scheme(bits=8)"),
        ("int8", "Scheme(bits=8)"),
        (
            "w4g64a",
            "Scheme(bits=4, granularity=Granularity.PerGroup(by=64, dim=1), mode=Mode.Asymmetric)",
        ),
        ("w3g128s", "Scheme(bits=3, granularity=Granularity.PerGroup(by=128, dim=1))"),
        ("w2t", "Scheme(bits=2, granularity=Granularity.PerTensor)"),
        ("w2r", "Scheme(bits=2)"),
        ("w5raf", "Scheme(bits=5, mode=Mode.Asymmetric, zero_point='float')"),
        ("nf4", "Scheme(bits=4, granularity=Granularity.PerGroup(by=64, dim=1), grid='nf4')"),
        ("nf4g32", "Scheme(bits=4, granularity=Granularity.PerGroup(by=32, dim=1), grid='nf4')"),
        ("fp4r", "Scheme(bits=4, grid='fp4')"),
        ("mxfp4", "Scheme(bits=4, granularity=Granularity.PerGroup(by=32, dim=1), grid='mxfp4')"),
        (
            "mxfp4g32",
            "Scheme(bits=4, granularity=Granularity.PerGroup(by=32, dim=1), grid='mxfp4')",
        ),
        ("kmeans4", "Scheme(bits=4, granularity=Granularity.PerTensor, grid='kmeans')"),
        ("kmeans3r", "Scheme(bits=3, grid='kmeans')"),
        ("binary", "Scheme(bits=1, grid='binary')"),
        ("ternary", "Scheme(bits=2, grid='ternary')"),
        (
            "w4g64a+dq",
            "Scheme(bits=4, granularity=Granularity.PerGroup(by=64, dim=1), mode=Mode.Asymmetric, "
            "double_quant=True)",
        ),
        ("w6+bf16", "Scheme(bits=6, scale_dtype='bfloat16')"),
    ],
)
def test_short_names(text: str, expected: str) -> None:
    assert repr(Scheme.parse(text)) == expected


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (Scheme.int8(), "w8"),
        (Scheme.nf4(), "nf4g64"),
        (Scheme.nf4(group=None), "nf4r"),
        (Scheme.fp4(group=16), "fp4g16"),
        (Scheme.mxfp4(), "mxfp4"),
        (Scheme.ternary(), "ternary"),
        (Scheme.ternary(group=128), "ternaryg128"),
        (Scheme.binary(group=32), "binaryg32"),
        (Scheme.kmeans(4), "kmeans4"),
        (Scheme.kmeans(2, per_row=True), "kmeans2r"),
        (Scheme(4, GROUP(64), Mode.Asymmetric, double_quant=True), "w4g64a+dq"),
        (
            Scheme(4, GROUP(32), Mode.Asymmetric, zero_point="fixed", double_quant=True),
            "w4g32af+dq",
        ),
        (
            Scheme(4, GROUP(32), Mode.Asymmetric, zero_point="float", double_quant=True),
            "w4g32af+dqs",
        ),
    ],
    ids=str,
)
def test_constructors_have_names(scheme: Scheme, name: str) -> None:
    assert str(scheme) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "w",
        "w0",
        "4g64",
        "w4g",
        "w4g64b",
        "kmeans",
        "ternary2",
        "nf3",
        "W4",
        " w4",
        "w4 ",
        "w4g-1",
        "w04",
        "binary1",
        "w4a+",
    ],
)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{text!r} names no scheme; names are such")):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w9", r"grid 'integer' has codes of 1\.\.8 bits, not bits=9"),
        ("w4g0", r"PerGroup: by=0, but a group has at least 1 number"),
        ("nf44", r"grid 'nf4' has codes of 4 bits, not bits=44"),
        ("nf4a", r"grid 'nf4' has no zero points: use Mode.Symmetric"),
        (
            "w4+f8",
            r"'w4\+f8' has the option \+f8; allowed are \+dq, \+order, \+cols, \+f32, \+f64, "
            r"\+f16, \+bf16",
        ),
        ("w4+f16+f32", r"'w4\+f16\+f32' says twice what the scales are"),
        ("w4g8+dq+dq", r"'w4g8\+dq\+dq' says twice what the scales are"),
    ],
)
def test_names_of_schemes_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0}, r"grid 'integer' has codes of 1\.\.8 bits, not bits=0"),
        ({"bits": 1}, r"a signed code of 1 bit is -1 or 0: use Scheme.binary\(\)"),
        ({"bits": 3, "grid": "fp4"}, r"grid 'fp4' has codes of 4 bits, not bits=3"),
        ({"bits": 2, "grid": "binary"}, r"grid 'binary' has codes of 1 bit, not bits=2"),
        ({"bits": 9, "grid": "kmeans"}, r"grid 'kmeans' has codes of 1\.\.8 bits, not bits=9"),
        ({"bits": 4, "grid": "int"}, r"grid must be one of integer, nf4, .*, not 'int'"),
        (
            {"bits": 4, "grid": "kmeans", "mode": Mode.Asymmetric},
            r"grid 'kmeans' has no zero points: use Mode.Symmetric",
        ),
        ({"bits": 4, "zero_point": "float"}, r"zero_point='float' needs zero points: use Mode.Asy"),
        (
            {"bits": 4, "zero_point": None},
            r"zero_point must be one of 'integer', 'float', 'fixed', not None",
        ),
        (
            {"bits": 4, "granularity": Granularity.PerDimension(0)},
            r"has its scales along the rows: .*, not Granularity.PerDimension\(dim=0\); quantize_",
        ),
        (
            {"bits": 4, "granularity": GROUP(8, 0)},
            r"has its scales along the rows: .*, not Granularity.PerGroup\(by=8, dim=0\)",
        ),
        (
            {"bits": 4, "granularity": GROUP(64), "grid": "mxfp4"},
            r"grid 'mxfp4' has groups of 32, PerGroup\(32, 1\), not .*; Scheme.fp4 takes other",
        ),
        (
            {"bits": 4, "granularity": GROUP(32), "grid": "mxfp4", "scale_dtype": "float16"},
            r"grid 'mxfp4' has scales of its own, exponents in uint8: leave scale_dtype and",
        ),
        (
            {"bits": 4, "granularity": GROUP(32), "grid": "mxfp4", "double_quant": True},
            r"grid 'mxfp4' has scales of its own",
        ),
        (
            {"bits": 4, "granularity": GROUP(8), "double_quant": True, "scale_dtype": "float32"},
            r"double_quant makes the scales uint8 codes: leave scale_dtype='float32' out",
        ),
        (
            {"bits": 4, "mode": Mode.Asymmetric, "zero_point": "fixed"},
            r"zero_point='fixed', 8 bits, stands beside scales of 8 bits: use double_quant=True",
        ),
        (
            {"bits": 4, "double_quant": True},
            r"double_quant shares a step .*: use PerGroup\(by, 1\)",
        ),
    ],
)
def test_fields_that_do_not_go_together(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 4.0}, r"bits must be an integer, not 4.0"),
        ({"bits": 4, "granularity": 64}, r"granularity must be Granularity.PerTensor, .*, not 64"),
        ({"bits": 4, "mode": "asymmetric"}, r"mode must be Mode.Symmetric or Mode.Asymmetric"),
        ({"bits": 4, "scale_dtype": "int8"}, r"a scale has dtype int8; allowed are float32"),
        ({"bits": 4, "double_quant": 1}, r"double_quant must be True or False, not 1"),
    ],
)
def test_fields_of_the_wrong_type(fields: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Scheme(**fields)


def test_fields_are_settled() -> None:
    torch = pytest.importorskip("torch")
    assert Scheme(4, Granularity.PerDimension(-1)) == Scheme(4)
    assert Scheme(4, GROUP(8, -1)) == Scheme(4, GROUP(8))
    assert Scheme(4, scale_dtype=torch.bfloat16).scale_dtype == "bfloat16"
    with pytest.raises((AttributeError, TypeError)):
        Scheme(4).bits = 5  # type: ignore[misc]


def test_match_statements() -> None:
    def describe(scheme: Scheme) -> tuple:
        match scheme:
            case Scheme(grid="ternary"):
                return ("ternary",)
            case Scheme(bits, Granularity.PerGroup(by), Mode.Asymmetric):
                return ("groups", bits, by)
            case Scheme(bits=bits, granularity=Granularity.PerTensor):
                return ("tensor", bits)
        return ("other",)

    names = ("ternary", "w4g64a", "kmeans5", "w8")
    expected = [("ternary",), ("groups", 4, 64), ("tensor", 5), ("other",)]
    assert [describe(Scheme.parse(name)) for name in names] == expected


@pytest.mark.parametrize(
    ("plain", "error", "message"),
    [
        ([4], TypeError, r"a scheme is a mapping of fields, not list"),
        ({}, ValueError, r"a scheme needs the field 'bits'"),
        ({"bits": 4, "width": 4}, ValueError, r"a scheme has no field 'width'; allowed are bits, "),
        ({"bits": 4, "mode": "signed"}, ValueError, r"mode must be 'symmetric' or 'asymmetric', n"),
        ({"bits": 4, "granularity": "row"}, ValueError, r"granularity must be {'kind': 'tensor'}"),
        ({"bits": 4, "granularity": {"kind": "row", "by": 3}}, ValueError, r"not {'kind': 'row', "),
        ({"bits": "4"}, TypeError, r"bits must be an integer, not '4'"),
    ],
)
def test_plain_values_that_are_no_scheme(plain: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Scheme.from_dict(plain)  # type: ignore[arg-type]
    assert Scheme.from_dict({"bits": 4}) == Scheme(4)


def test_a_scheme_or_its_name() -> None:
    assert scheme_of("w8") == scheme_of(Scheme.int8()) == Scheme.int8()
    with pytest.raises(TypeError, match="scheme must be a Scheme or its short name, not 8"):
        scheme_of(8)
    with pytest.raises(TypeError, match="the name of a scheme is a string, not int"):
        Scheme.parse(8)  # type: ignore[arg-type]


# ---- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "expected"),
    [
        ("w8", (4096, 4096), "float32", 4096 * 4096 + 4 * 4096),
        ("w4g64", (8, 100), "float16", 8 * 50 + 8 * 2 * 2),
        ("w4g64a", (8, 100), "float32", 8 * 50 + 8 * 2 * 4 + 8 * 1),
        ("w3g8a", (5, 33), "bfloat16", 5 * 13 + 5 * 5 * 2 + 5 * 2),
        ("w3g8af", (5, 33), "bfloat16", 5 * 13 + 5 * 5 * 2 + 5 * 5 * 2),
        ("w3g8af+f32", (5, 33), "bfloat16", 5 * 13 + 5 * 5 * 4 + 5 * 5 * 2),
        ("w4g32+dq", (6, 64), "float64", 6 * 32 + 6 * 2 + 6 * 4),
        ("w4g32af+dq", (6, 64), "float64", 6 * 32 + 6 * 2 + 6 * 2 + 6 * 2),
        ("w4g32af+dqs", (6, 64), "float64", 6 * 32 + 6 * 2 + 6 * 4 + 6 * 2 * 8),
        ("w8t", (3, 5), "float32", 3 * 5 + 3 * 4),
        ("nf4g64", (4, 64), "float32", 4 * 32 + 4 * 4 + 16 * 4),
        ("mxfp4", (4, 65), "bfloat16", 4 * 33 + 4 * 3 + 16 * 2),
        ("kmeans3", (4, 64), "float32", 4 * 24 + 4 * 4 + 8 * 4),
        ("kmeans3r", (4, 64), "float32", 4 * 24 + 4 * 4 + 4 * 8 * 4),
        ("kmeans3g16", (4, 64), "float32", 4 * 24 + 4 * 4 * 4 + 8 * 4),
        ("binaryg32", (2, 64), "float16", 2 * 8 + 2 * 2 * 2 + 2 * 2),
        ("ternary", (3, 11), "float32", 3 * 3 + 3 * 4),
        ("w4g64", (0, 100), "float32", 0),
        ("w4g64", (7, 0), "float32", 0),
        ("w4", (7, 0), "float32", 28),
    ],
)
def test_bytes(name: str, shape: tuple[int, int], dtype: str, expected: int) -> None:
    scheme = Scheme.parse(name)
    assert scheme.nbytes(shape, dtype) == expected
    if math.prod(shape):
        assert scheme.bits_per_weight(shape, dtype) == 8 * expected / math.prod(shape)
    else:
        assert math.isnan(scheme.bits_per_weight(shape, dtype))


def test_groups() -> None:
    scheme = Scheme.parse("w4g64")
    assert [(scheme.group(k), scheme.groups(k)) for k in (0, 1, 63, 64, 65, 128)] == [
        (1, 0),
        (1, 1),
        (63, 1),
        (64, 1),
        (64, 2),
        (64, 2),
    ]
    assert [(Scheme(4).group(k), Scheme(4).groups(k)) for k in (0, 1, 7)] == [
        (1, 1),
        (1, 1),
        (7, 1),
    ]


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3), (-1, 2)])
def test_shapes_that_no_matrix_has(shape: tuple) -> None:
    with pytest.raises(ValueError, match=r"shape must be \(out_features, in_features\), not"):
        Scheme(4).nbytes(shape)
    with pytest.raises(TypeError, match="a packed matrix has dtype int8"):
        Scheme(4).nbytes((2, 2), "int8")
