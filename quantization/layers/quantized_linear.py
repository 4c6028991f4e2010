"""The linear layer of quantized weights, whatever the form of its codes; one form into another."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Self

import torch
from torch import nn

from quantization.layers.float_layers import float_parts, is_conv1d
from quantization.layers.quantized_module import QuantizedModule, check_sizes
from quantization.ops.dtypes import name_of, source_of
from quantization.schemes.conversion import repack
from quantization.schemes.kernel_choice import LinearKernel, linear_kernel
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme, scheme_of


class QuantizedLinear(QuantizedModule, nn.Linear):
    """A linear layer of quantized weights: a subclass of nn.Linear, so that libraries see one.

    It holds buffers only and no Parameters; the bias may be made one. A class that others are
    turned into names its form: ``class Mine(QuantizedLinear, form="packed")``.
    """

    _forms: ClassVar[dict[str, type[QuantizedLinear]]] = {}

    bias: Any  # a tensor, a Parameter or None

    def __init_subclass__(cls, form: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if form is not None:
            QuantizedLinear._forms[form] = cls

    def _init_linear(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: Any
    ) -> torch.Tensor | None:
        """The checks of a constructor, the sizes, and the bias that is to be registered."""
        source_of(dtype, "a quantized layer")
        check_sizes(in_features=in_features, out_features=out_features)
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        return torch.empty(out_features, dtype=dtype, device=device) if bias else None

    @classmethod
    def _of_float(cls, linear: nn.Module, arguments: dict[str, Any], **options: Any) -> Self:
        """The layer of a float one, built with more arguments and quantized with options."""
        weight, bias = float_parts(linear)
        layer: Any = cls(
            in_features=weight.shape[1],
            out_features=weight.shape[0],
            bias=bias is not None,
            dtype=weight.dtype,
            **arguments,
        )
        layer.quantize(weight, **options)
        layer.was_conv1d = is_conv1d(linear)
        layer.bias = bias
        made: Self = layer.train(linear.training)
        return made

    @classmethod
    def from_packed(cls, packed: PackedWeights, bias: torch.Tensor | None = None) -> Self:
        """The layer of exactly the weight that is packed already."""
        raise NotImplementedError

    # ---- one form into another ---------------------------------------------------------------

    def to_scheme(self, scheme: Scheme | str) -> QuantizedLinear:
        """The packed layer of another scheme; this one is left as it is.

        Exact where the codes are whole numbers that fit: from symmetric or whole zero-pointed codes
        to symmetric ones of enough bits, a scale being copied to the groups that it is split over.
        Otherwise the numbers that the codes stand for are quantized anew, which adds an error to
        that which they have: from the float layer is better, where there is one.

        Args:
            scheme: a :class:`quantization.Scheme`, or its short name.

        Returns:
            A :class:`quantization.PackedLinearLayer`.

        Raises:
            TypeError, ValueError: if it is neither.

        Example:
            >>> from quantization import PackedLinearLayer, QWQALinearLayer
            >>> layer = QWQALinearLayer(64, 32)
            >>> bool((layer.to_scheme("int8").weight == layer.weight).all())
            True
            >>> layer = PackedLinearLayer(64, 32, scheme="w4")
            >>> bool((layer.to_scheme("w8g32").weight == layer.weight).all())
            True
        """
        return self._in_form("packed", repack(self.packed(), scheme_of(scheme)))

    def to_int8(self) -> QuantizedLinear:
        """The int8 layer of exactly the same weight; this one is left as it is.

        Returns:
            A :class:`quantization.QWQALinearLayer`.

        Raises:
            ValueError: where there is none: a row has several scales, or a code stands for no whole
                number of -128..127. ``QWQALinearLayer.from_float(layer.dequantize())`` rounds.

        Example:
            >>> from quantization import PackedLinearLayer
            >>> layer = PackedLinearLayer(64, 32, scheme="w5")
            >>> bool((layer.to_int8().weight == layer.weight).all())
            True
        """
        return self._in_form("int8", self.packed())

    def _in_form(self, form: str, packed: PackedWeights) -> QuantizedLinear:
        bias = None if self.bias is None else self.bias.detach()
        new = self._forms[form].from_packed(packed, bias)
        new.was_conv1d = self.was_conv1d
        return new.train(self.training)

    # ---- what is the same for all ------------------------------------------------------------

    def kernel(self, tokens: int = 1, dtype: torch.dtype | None = None) -> LinearKernel:
        """What ``forward`` would run for so many rows of activations, on this CPU, now.

        Args:
            tokens: rows of activations, 1 or more.
            dtype: of the activations; None: that of the layer.

        Raises:
            TypeError: for a dtype that is none of the kernels'.
            ValueError: for fewer tokens than 1, or a layer without features.

        Example:
            >>> from quantization import QWQALinearLayer
            >>> QWQALinearLayer(64, 64, dtype=torch.bfloat16).kernel(128).dtype
            'bfloat16'
        """
        dtype = self.dtype if dtype is None else dtype
        return linear_kernel(tokens, self.out_features, self.in_features, dtype, self._scheme)

    def extra_repr(self) -> str:
        """Sizes, dtype, codes and bytes, for printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dtype={name_of(self.dtype)}, "
            f"weights={self._scheme or 'int8 per row'}, {self.footprint:,} bytes"
        )

    def _float_module(self, device: Any, dtype: torch.dtype) -> nn.Linear:
        sizes, has_bias = (self.in_features, self.out_features), self.bias is not None
        return nn.Linear(*sizes, bias=has_bias, device=device, dtype=dtype)

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _set_buffers(self, buffers: dict[str, torch.Tensor | None], shape: tuple[int, ...]) -> None:
        codes = buffers[self._weight_names()[0]]
        self.bias = None if codes is None else bias_beside(codes, self.bias)
        super()._set_buffers(buffers, shape)
        self.out_features, self.in_features = shape


def check_bias(bias: torch.Tensor | None, out_features: int) -> None:
    """Raise unless a bias is None, or has one number a row that the kernels add.

    Raises:
        TypeError: for another dtype than float32, float64, float16 and bfloat16.
        ValueError: for another shape.

    Example:
        >>> check_bias(torch.ones(3), 4)
        Traceback (most recent call last):
        ...
        ValueError: bias has shape (3,); expected (4,)
    """
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({out_features},)")
    if bias is not None:
        source_of(bias.dtype, "bias")


def bias_beside(codes: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The bias on the device of the codes; zeros if it has another length, or no numbers.

    Args:
        codes: ``[out_features, ...]``.
        bias: ``[out_features]``, or of another length, or None.

    Example:
        >>> bias_beside(torch.zeros(3, 2), torch.ones(4))
        tensor([0., 0., 0.])
    """
    shape = codes.shape[:1]
    if bias is None or (bias.shape == shape and bias.device == codes.device):
        return bias
    if bias.shape == shape and not bias.is_meta:
        moved = bias.detach().to(codes.device)
    else:
        moved = torch.zeros(shape, dtype=bias.dtype, device=codes.device)
    return nn.Parameter(moved) if isinstance(bias, nn.Parameter) else moved


def accepted(function: Any, **options: Any) -> dict[str, Any]:
    """Those options that a function takes: what a user's class need not know is not passed to it.

    Example:
        >>> accepted(lambda weights, name: None, name="0.weight", nonfinite="raise")
        {'name': '0.weight'}
    """
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return options
    return {name: value for name, value in options.items() if name in parameters}
