"""The torch operators: one table of their arguments, and what a call of any of them means.

All five do one thing: rows meet a quantized weight, or in the backward its transpose. So a kernel,
whether for fake tensors, for another device or in Python, is one function of a :class:`Call`, and
:meth:`Operator.kernel` makes of it what torch calls with the arguments of the table.
"""

from __future__ import annotations

from collections.abc import Callable
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
        names = [argument.split()[-1] for argument in self.arguments.split(", ")]
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


_ROWS = "Tensor weights, Tensor scales"
_PACKED = f"{_ROWS}, Tensor scale_steps, Tensor zero_points, Tensor codebook"
_NUMBERS = "int bits, int group, int present"

#: The operators of ``torch.ops.quantization``. C registers the same (csrc, torch_ops.c).
OPERATORS = (
    Operator("linear", f"Tensor x, {_ROWS}, ScalarType dtype"),
    Operator("linear_bias", f"Tensor x, {_ROWS}, Tensor bias, ScalarType dtype"),
    Operator("linear_backward", f"Tensor grad, {_ROWS}, ScalarType dtype"),
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
