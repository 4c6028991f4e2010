"""The torch operators: one table of their arguments, what a call means, and what it must be.

All five do one thing: rows meet a quantized weight, or in the backward its transpose. So a kernel,
whether for fake tensors, for another device or in Python, is one function of a :class:`Call`, and
:meth:`Operator.kernel` makes of it what torch calls with the arguments of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

#: Bits of ``present``: which tensors of a packed operator are there. In the place of one that is
#: not, scales are given.
HAS_STEPS, HAS_ZEROS, HAS_CODEBOOK, HAS_BIAS = 1, 2, 4, 8
_FLAGS = {
    "scale_steps": HAS_STEPS,
    "zero_points": HAS_ZEROS,
    "codebook": HAS_CODEBOOK,
    "bias": HAS_BIAS,
}


class Call(NamedTuple):
    """One call of an operator, its arguments told apart; None for a tensor that is not there.

    ``rows`` are activations, or in the backward the gradient of a result, and ``dtype`` is that of
    what is returned. The other names are those of
    :func:`quantization.ops.torch_ops.packed_linear`; without a ``group``, weights are int8 codes
    with a scale a row.
    """

    is_backward: bool
    rows: torch.Tensor
    dtype: torch.dtype
    in_features: int
    weights: torch.Tensor
    scales: torch.Tensor
    scale_steps: torch.Tensor | None = None
    zero_points: torch.Tensor | None = None
    codebook: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    bits: int = 8
    group: int | None = None

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.weights.shape[0]

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All but the rows: weights, scales, scale steps, zero points, codebook and bias."""
        return (
            self.weights,
            self.scales,
            self.scale_steps,
            self.zero_points,
            self.codebook,
            self.bias,
        )

    @property
    def result_shape(self) -> tuple[int, ...]:
        """Of what the operator returns."""
        columns = self.in_features if self.is_backward else self.out_features
        return (*self.rows.shape[:-1], columns)


class Operator(NamedTuple):
    """A row of the table: a name, and the arguments as torch's schemas write them."""

    name: str
    arguments: str

    @property
    def schema(self) -> str:
        """What torch registers.

        Example:
            >>> OPERATORS[0].schema
            'linear(Tensor x, Tensor weights, Tensor scales, ScalarType dtype) -> Tensor'
        """
        return f"{self.name}({self.arguments}) -> Tensor"

    @property
    def is_backward(self) -> bool:
        """Whether rows meet the transpose of the weight."""
        return self.name.endswith("_backward")

    def call(self, *arguments: Any) -> Call:
        """The arguments of a call, told apart."""
        names = _names(self.arguments)
        given = dict(zip(names, arguments, strict=True))
        rows = given.pop(names[0])
        present = given.pop("present", HAS_BIAS)
        for name, flag in _FLAGS.items():
            if not present & flag:  # it only holds a place
                given.pop(name, None)
        if "in_features" not in given:  # int8 weights have a column for each
            columns = (given["weights"] if self.is_backward else rows).shape[-1:]
            given["in_features"] = columns[0] if columns else 0
        return Call(self.is_backward, rows, **given)

    def kernel(self, implementation: Callable[[Call], torch.Tensor]) -> Callable[..., torch.Tensor]:
        """The implementation as a kernel of this operator, which takes the arguments as they are.

        Example:
            >>> shape = OPERATORS[0].kernel(lambda call: call.result_shape)
            >>> shape(torch.ones(2, 3), torch.ones(5, 3).char(), torch.ones(5), torch.float32)
            (2, 5)
        """
        return lambda *arguments: implementation(self.call(*arguments))


@cache
def _names(arguments: str) -> tuple[str, ...]:
    return tuple(argument.split()[-1] for argument in arguments.split(", "))


_INT8 = "Tensor weights, Tensor scales"
_PACKED = f"{_INT8}, Tensor scale_steps, Tensor zero_points, Tensor codebook"
_NUMBERS = "int bits, int group, int present"

#: The operators of ``torch.ops.quantization``. C registers the same (csrc/torch/torch_ops.c).
OPERATORS = (
    Operator("linear", f"Tensor x, {_INT8}, ScalarType dtype"),
    Operator("linear_bias", f"Tensor x, {_INT8}, Tensor bias, ScalarType dtype"),
    Operator("linear_backward", f"Tensor grad, {_INT8}, ScalarType dtype"),
    Operator("packed", f"Tensor x, {_PACKED}, Tensor bias, {_NUMBERS}, ScalarType dtype"),
    Operator(
        "packed_backward",
        f"Tensor grad, {_PACKED}, int in_features, {_NUMBERS}, ScalarType dtype",
    ),
)


def with_stand_ins(
    weights: torch.Tensor,
    scales: torch.Tensor,
    scale_steps: torch.Tensor | None,
    zero_points: torch.Tensor | None,
    codebook: torch.Tensor | None,
) -> tuple[tuple[torch.Tensor, ...], int]:
    """The tensors as a packed operator takes them, scales in the place of None; and ``present``.

    Example:
        >>> with_stand_ins(torch.ones(1), torch.ones(2), None, torch.ones(3), None)[1] == HAS_ZEROS
        True
    """
    present = HAS_STEPS | HAS_ZEROS | HAS_CODEBOOK
    if scale_steps is None:
        scale_steps, present = scales, present ^ HAS_STEPS
    if zero_points is None:
        zero_points, present = scales, present ^ HAS_ZEROS
    if codebook is None:
        codebook, present = scales, present ^ HAS_CODEBOOK
    return (weights, scales, scale_steps, zero_points, codebook), present


# ---- what a call asks of its tensors, on whatever device; csrc checks the same ----------------

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_call(call: Call) -> None:
    """Shapes, dtypes and devices of a quantized weight and of what meets it.

    Raises:
        RuntimeError: if something does not fit.
    """
    if call.group is None:
        _check_int8(call)
    else:
        _check_packed(call, call.group)
    _check_floats(call)
    torch._check(
        call.rows.layout is torch.strided,
        lambda: f"layout {call.rows.layout} will not do; only dense (strided) tensors will",
    )


def _check_int8(call: Call) -> None:
    rows, weights = call.rows, call.weights
    check_devices(rows, weights, call.scales, call.bias)
    torch._check(weights.dtype == torch.int8, lambda: f"weights must be int8, not {weights.dtype}")
    side = 0 if call.is_backward else 1  # of the weights, that the columns of rows run along
    torch._check(
        weights.dim() == 2 and rows.dim() >= 1 and rows.shape[-1] == weights.shape[side],
        lambda: f"input {tuple(rows.shape)} does not fit weights {tuple(weights.shape)}",
    )
    for vector in (call.scales, call.bias):
        torch._check(
            vector is None or (vector.dim() == 1 and vector.shape[0] == weights.shape[0]),
            lambda: f"scales and bias must have {weights.shape[0]} elements (out_features)",
        )


def _check_packed(call: Call, group: int) -> None:
    rows, weights, bits = call.rows, call.weights, call.bits
    torch._check(
        0 <= bits <= 8 and group >= 1,
        lambda: "bits must be 0 (base 3) or 1..8, and group at least 1",
    )
    torch._check(
        bits > 0 or (call.zero_points is None and call.codebook is None),
        lambda: "base-3 codes have neither zero points nor a codebook: bits must be 1..8",
    )
    torch._check(
        weights.dtype == torch.uint8 and weights.dim() == 2,
        lambda: "weights must be uint8 [out_features, bytes of a packed row]",
    )
    out, groups = call.out_features, -(-call.in_features // group)
    torch._check(
        tuple(weights.shape) == (out, packed_row_bytes(call.in_features, bits))
        and tuple(call.scales.shape) == (out, groups),
        lambda: (
            f"packed weights {tuple(weights.shape)} and scales {tuple(call.scales.shape)} do not "
            f"fit {call.in_features} input features of {bits} bits in groups of {group}"
        ),
    )
    _check_optional(call, groups)
    check_devices(rows, *call.tensors)
    torch._check(
        rows.dim() >= 1 and (not call.is_backward or rows.shape[-1] == out),
        lambda: f"grad {tuple(rows.shape)} must have {out} columns (out_features)",
    )


def _check_optional(call: Call, groups: int) -> None:
    """The tensors that not all packed weights have."""
    steps, zeros, codebook, bias = call.tensors[2:]
    out, levels = call.out_features, 2**call.bits
    if zeros is not None:
        is_packed, have = zeros.dtype == torch.uint8, tuple(zeros.shape)
        must = (out, packed_row_bytes(groups, call.bits) if is_packed else groups)
        torch._check(have == must, lambda: f"zero_points {have} must be {must}")
    if codebook is not None:
        of_all, of_rows, found = (1, levels), (out, levels), tuple(codebook.shape)
        torch._check(
            found in (of_all, of_rows), lambda: f"codebook {found} must be {of_all} or {of_rows}"
        )
    if steps is not None:
        torch._check(
            tuple(steps.shape) == (out,) and call.scales.dtype == torch.uint8,
            lambda: f"scale_steps must be [{out}], of uint8 scales",
        )
    if bias is not None:
        size = tuple(bias.shape)
        torch._check(
            size == (out,),
            lambda: f"bias must have {out} elements (out_features), not shape {size}",
        )


def _check_floats(call: Call) -> None:
    types = [call.dtype, call.rows.dtype]
    for tensor, codes in (
        (call.scales, [torch.uint8] if call.group is not None else []),
        (call.scale_steps, []),
        (call.zero_points, [torch.uint8, torch.int8]),
        (call.codebook, []),
        (call.bias, []),
    ):
        if tensor is not None and tensor.dtype not in codes:
            types.append(tensor.dtype)
    wrong = [dtype for dtype in types if dtype not in _FLOATS]
    torch._check(
        not wrong, lambda: f"must be float32, bfloat16, float16 or float64, not {wrong[0]}"
    )


def packed_row_bytes(count: int, bits: int) -> int:
    """Bytes of a row of ``count`` codes; 0 bits: five ternary codes a byte.

    Example:
        >>> packed_row_bytes(10, 3), packed_row_bytes(10, 0)
        (4, 2)
    """
    return -(-count // 5) if bits == 0 else (count * bits + 7) // 8


def check_devices(rows: torch.Tensor, *tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError unless all are on one device.

    One tensor that is elsewhere is enough to bring torch to the kernel of that device: one on meta
    to a result without numbers, which must then be what everybody expects.

    Example:
        >>> check_devices(torch.ones(2), torch.ones(2, device="meta"))
        Traceback (most recent call last):
        ...
        RuntimeError: some tensors are on the meta device, without numbers, and some are not: load \
or move them first
    """
    for tensor in tensors:
        if tensor is None or tensor.device == rows.device:
            continue
        torch._check(
            tensor.is_meta == rows.is_meta,
            lambda: (
                "some tensors are on the meta device, without numbers, and some are not: load "
                "or move them first"
            ),
        )
        raise RuntimeError(
            f"the input is on {rows.device}, but tensors of the layer are on {tensor.device}: "
            "move the layer or the input, so that both are on one device"
        )
