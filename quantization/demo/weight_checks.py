"""What quantization does to given weights: errors by mode and granularity, packing, agreement.

Each function measures and returns; the suite in `main` prints and judges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantization.numerics.linear_quantization import (
    PER_ROWS,
    Granularity,
    Mode,
    QuantizationParameters,
    dequantize_linear,
    quantize_linear,
)
from quantization.numerics.weight_packing import pack_weights, unpack_weights
from quantization.ops import runtime
from quantization.ops.linear import quantized_forward

GROUP = 64
GRANULARITIES = {
    "tensor": Granularity.PerTensor,
    "row": Granularity.PerDimension(1),
    "column": Granularity.PerDimension(0),
    f"{GROUP} of a row": Granularity.PerGroup(GROUP, 1),
    f"{GROUP} of a column": Granularity.PerGroup(GROUP, 0),
}
#: (code type, its bits, modes)
CODES = (
    ("int8", 8, (Mode.Symmetric, Mode.Asymmetric)),
    ("int4", 4, (Mode.Symmetric, Mode.Asymmetric)),
    ("int2", 2, (Mode.Symmetric, Mode.Asymmetric)),
    ("int1", 1, (Mode.Symmetric,)),
    ("float8_e4m3fn", 8, (Mode.Symmetric,)),
    ("float8_e5m2", 8, (Mode.Symmetric,)),
)


@dataclass
class WeightError:
    """Error of one code type, mode and granularity over some weights.

    Attributes:
        relative_rms: root of the summed squared error over the summed squares.
        bytes_per_weight: packed codes, with scales and zero points at 4 bytes each.
        worst_in_steps: largest error in units of its block's scale; at most 0.5 for integer codes
            of 2 bits and more.
    """

    code: str
    bits: int
    mode: str
    granularity: str
    relative_rms: float
    bytes_per_weight: float
    worst_in_steps: float

    @property
    def has_half_step_bound(self) -> bool:
        """Whether rounding bounds each error by half a step (not so for floats and for 1 bit)."""
        return self.bits > 1 and not self.code.startswith("float")


def compare_choices(weights: list[Tensor]) -> list[WeightError]:
    """Errors of every code type, mode and granularity of the tables above, over all `weights`.

    Args:
        weights: float matrices [out_features, in_features].

    Example:
        >>> errors = compare_choices([torch.linspace(-1, 1, 4096).view(64, 64)])
        >>> max(error.worst_in_steps for error in errors if error.has_half_step_bound) < 0.5001
        True
    """
    return [
        _error(weights, code, bits, mode, label)
        for code, bits, modes in CODES
        for mode in modes
        for label in GRANULARITIES
    ]


def _error(weights: list[Tensor], code: str, bits: int, mode: Mode, label: str) -> WeightError:
    squares = total = size = worst = 0.0
    for weight in weights:
        codes, params = quantize_linear(weight, code, GRANULARITIES[label], mode)
        error = dequantize_linear(codes, params).sub_(weight)
        squares += torch.linalg.vector_norm(error).item() ** 2
        total += torch.linalg.vector_norm(weight).item() ** 2
        numbers = params.scale.numel() * (1 if mode == Mode.Symmetric else 2)
        size += weight.numel() * bits / 8 + 4 * numbers
        worst = max(worst, error.div_(_step(params, weight)).abs_().max().item())
    count = sum(weight.numel() for weight in weights)
    return WeightError(code, bits, mode.name, label, (squares / total) ** 0.5, size / count, worst)


def _step(params: QuantizationParameters, weight: Tensor) -> Tensor:
    """The scale of each weight, in its shape or broadcasting to it."""
    if params.group_by is None:
        return params.scale
    spread = params.scale.repeat_interleave(params.group_by, dim=params.dim)
    return spread.narrow(params.dim, 0, weight.shape[params.dim])


def equals_torch_expression(weight: Tensor) -> bool:
    """Whether int8 codes a row equal those of the plain torch expression, bit for bit.

    Example:
        >>> equals_torch_expression(torch.linspace(-3, 2, 999).view(27, 37))
        True
    """
    scale = weight.abs().amax(dim=PER_ROWS, keepdim=True) / 127
    expected = (weight / scale).round().clamp(-127, 127).to(torch.int8)
    codes, params = quantize_linear(weight, torch.int8, Granularity.PerDimension(PER_ROWS))
    return torch.equal(codes, expected) and torch.equal(params.scale, scale)


def equals_numpy(weight: Tensor) -> bool:
    """Whether the ndarray of the same numbers gets the same codes for every choice.

    Example:
        >>> equals_numpy(torch.linspace(-3, 2, 999).view(27, 37))
        True
    """
    array = weight.numpy()
    for code, _, modes in CODES:
        if code.startswith("float8"):
            continue  # NumPy has no type of that name
        for mode in modes:
            for granularity in GRANULARITIES.values():
                ours, _ = quantize_linear(weight, code, granularity, mode)
                theirs, _ = quantize_linear(array, code, granularity, mode)
                if not (ours.numpy() == theirs).all():
                    return False
    return True


def packed_round_trip(
    weight: Tensor, bits: int, layout: str = "aligned"
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of a weight, their packed bytes and the codes out of them.

    The codes are unsigned in the aligned layout, which runs down the columns, and signed in the
    dense one, which runs along the rows.

    Example:
        >>> codes, packed, back = packed_round_trip(torch.linspace(-1, 1, 64).view(8, 8), 2)
        >>> packed.shape, torch.equal(codes, back)
        (torch.Size([2, 8]), True)
    """
    sign, dim = ("u", 0) if layout == "aligned" else ("", 1)
    code = f"{sign}int{bits}"
    codes, _ = quantize_linear(weight, code, Granularity.PerDimension(PER_ROWS), Mode.Asymmetric)
    packed, info = pack_weights(codes, bits, layout=layout, dim=dim, return_info=True)
    return codes, packed, unpack_weights(packed, info)


def isa_disagreement(weight: Tensor, isa: str, tokens: int = 5) -> tuple[bool, float]:
    """What one instruction set makes of a weight: is it right?

    Args:
        weight: float32 [out_features, in_features].
        isa: a name out of `quantization.isas()`; the active one is put back afterwards.
        tokens: rows of noise that go through the linear map.

    Returns:
        Whether its int8 codes equal those of the active instruction set, and the largest error of
        its linear map against float64, as a share of the bound (K + 2) * 2**-24 * sum|x * w|.

    Example:
        >>> same, share = isa_disagreement(torch.linspace(-1, 1, 4096).view(64, 64), "reference")
        >>> same, share <= 1
        (True, True)
    """
    granularity = Granularity.PerDimension(PER_ROWS)
    expected, params = quantize_linear(weight, torch.int8, granularity)
    noise = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(0))
    scales = params.scale.flatten()
    active = runtime.active_isa()
    runtime.set_isa(isa)
    try:
        codes, _ = quantize_linear(weight, torch.int8, granularity)
        y = quantized_forward(codes, noise, scales)
    finally:
        runtime.set_isa(active)
    exact = expected.double() * scales.double()[:, None]
    error = (y.double() - noise.double() @ exact.T).abs()
    bound = (weight.shape[1] + 2) * 2.0**-24 * (noise.double().abs() @ exact.abs().T)
    return torch.equal(codes, expected), (error / bound.clamp_min(1e-300)).max().item()
