"""Every quantized layer shows its codes as integers in the layout of its weight."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn

from quantization import PackedEmbedding, PackedLinearLayer, QWQALinearLayer, Scheme, pack_matrix
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

SCHEMES = ["int8", "w4", "w3g32a", "w5g16af", "nf4", "fp4g32", "mxfp4", "kmeans3r", "binary"]
SCHEMES += ["ternaryg32", "w4g32+dq"]


def decoded(codes: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """The weight, by the formula in the head of quantization.schemes.packed_weights."""
    packed, scheme = layer.packed(), layer.scheme
    place = torch.arange(codes.shape[1]) // scheme.group(codes.shape[1])
    values = codes.double()
    if packed.codebook is not None:
        book = packed.codebook.double().expand(len(codes), -1)
        values = book.gather(1, codes.long())
    if packed.zero_points is not None and packed.zero_points.dtype == torch.uint8:
        bits = [(packed.zero_points.int() >> shift) & 1 for shift in range(8)]
        stream = torch.stack(bits, -1).flatten(1)[:, : scheme.groups(codes.shape[1]) * scheme.bits]
        zeros = (stream.unflatten(1, (-1, scheme.bits)) << torch.arange(scheme.bits)).sum(-1)
        values = values - zeros.index_select(1, place)
    elif packed.zero_points is not None:
        values = values - packed.zero_points.double().index_select(1, place)
    scales = layer.scales.double()
    if packed.scale_steps is not None:
        scales = scales * packed.scale_steps.double()[:, None]
    elif layer.scales.dtype == torch.uint8:
        scales = 2.0 ** (scales - 127)
    return values * scales.index_select(1, place)


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_and_scales_lead_to_the_weight(name: str) -> None:
    scheme = Scheme.parse(name)
    for layer in (PackedLinearLayer(100, 8, scheme=name), PackedEmbedding(8, 100, scheme=name)):
        codes = layer.codes
        assert codes.shape == layer.weight.shape and codes.dtype in (torch.int8, torch.uint8)
        is_signed = scheme.grid in ("integer", "ternary") and "a" not in name.removeprefix(
            "ternary"
        )
        assert (codes.dtype == torch.int8) == is_signed
        torch.testing.assert_close(decoded(codes, layer).float(), layer.weight, rtol=1e-6, atol=0)


def test_codes_of_the_int8_layer_are_its_buffer() -> None:
    layer = QWQALinearLayer(100, 8)
    assert layer.codes is layer.int8_weights
    assert torch.equal(layer.codes * layer.scales[:, None], layer.weight)
    assert torch.equal(layer.to_scheme("int8").codes, layer.codes)


def test_codes_of_shapes_alone_and_of_a_conv1d() -> None:
    assert PackedLinearLayer(100, 8, device="meta").codes.is_meta
    assert QWQALinearLayer(100, 8, device="meta").codes.shape == (8, 100)

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nf, self.weight = 8, nn.Parameter(torch.randn(100, 8))
            self.bias = nn.Parameter(torch.zeros(8))

    layer = PackedLinearLayer.from_float(Conv1D(), "w4g32a")
    assert layer.was_conv1d and layer.codes.shape == layer.weight.shape == (8, 100)


@pytest.mark.parametrize("cls", [QWQALinearLayer, PackedLinearLayer, PackedEmbedding])
def test_a_layer_is_made_of_packed_tensors_alone(cls: type) -> None:
    with pytest.raises(TypeError, match="packed is a Tensor; pack_matrix makes one"):
        cls.from_packed(torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"packed holds ndarrays; pack a torch\.Tensor"):
        cls.from_packed(pack_matrix(np.ones((2, 2), "float32"), "int8"))
