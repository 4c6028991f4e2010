"""The linear layer of packed weights: 1 to 8 bits, any group size, any table of levels.

``y = x w^T + bias``, where ``w`` is what :mod:`quantization.schemes.packed_weights` says the codes
stand for. Activations are never quantized.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from quantization.layers.packed_module import DEFAULT_SCHEME, PackedModule
from quantization.layers.quantized_linear import QuantizedLinear, check_bias
from quantization.layers.quantized_module import check_packed
from quantization.ops import torch_ops
from quantization.schemes.column_order import COLUMN_PARTS, check_columns
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme

__all__ = ["PackedLinearLayer"]


class PackedLinearLayer(PackedModule, QuantizedLinear, form="packed"):
    """A linear layer that keeps its weight packed: codes of 1 to 8 bits and what belongs to them.

    A subclass of nn.Linear, so that libraries see one, but with buffers only and no Parameters:
    ``packed_weights``, ``scales``, and, where the scheme has them, ``scale_steps``,
    ``zero_points``, ``codebook``, ``input_order``, by which inputs are gathered, and
    ``input_scale``, by which they are multiplied (:mod:`quantization.schemes.packed_weights` says
    what each holds); ``bias`` (``[out_features]``, or None). Nothing else is resident. Gradients
    flow to the input. Assigning an nn.Parameter to ``bias`` makes the bias trainable.

    A fresh layer is initialised as nn.Linear is, with the same random numbers, and quantized; on
    the meta device it has shapes only. ``.to(dtype)`` casts floats, never codes; scales whose type
    the scheme says, and the steps of double quantization, keep theirs.

    Args:
        in_features: length of an input row; may be 0.
        out_features: length of an output row; may be 0.
        bias: whether there is a bias.
        scheme: a :class:`quantization.Scheme`, or its short name.
        dtype: of the floats: float32, bfloat16, float16 or float64. Activations may have another
            dtype than the layer; the result has theirs.
        device: of the buffers; None: torch's current default.

    Raises:
        TypeError: for another dtype, a number of features that is no integer, or no scheme.
        ValueError: for a negative number of features, or a name of no scheme.

    Example:
        >>> layer = PackedLinearLayer(64, 32, scheme="w4g64a")
        >>> layer(torch.randn(4, 64)).shape
        torch.Size([4, 32])
        >>> layer
        PackedLinearLayer(in_features=64, out_features=32, bias=True, dtype=float32, \
weights=w4g64a, 1,312 bytes)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: Scheme | str = DEFAULT_SCHEME,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | int | None = None,
    ) -> None:
        offsets = self._init_linear(in_features, out_features, bias, dtype, device)
        self._register_packed(scheme, dtype, device, bias=offsets)
        self.reset_parameters()

    @classmethod
    def from_float(
        cls,
        linear: nn.Module,
        scheme: Scheme | str = DEFAULT_SCHEME,
        *,
        nonfinite: str = "raise",
        name: str = "weight",
        **fitting: Any,
    ) -> Self:
        """The packed layer of a float one, which is left as it is.

        Args:
            linear: an nn.Linear, or a Conv1D of transformers (whose weight is [in, out]); of
                float32, bfloat16, float16 or float64, on any device including meta.
            scheme: a :class:`quantization.Scheme`, or its short name.
            nonfinite: as for :meth:`quantize`.
            name: what error messages call the weight.
            fitting: ``importance``, ``method`` and ``statistics``, as for :meth:`quantize`.

        Returns:
            A layer of the weight's dtype and device and of the training flag of ``linear``; its
            bias shares memory with that of ``linear``. Out of a Conv1D it goes on to take float
            checkpoints as those have it, [in, out]. Hooks stay behind;
            :func:`quantization.quantize_model` carries them over.

        Raises:
            TypeError: if ``linear`` cannot be converted; the message says why.
            ValueError: for a NaN or infinity in the weight, with its index.

        Example:
            >>> linear = nn.Linear(64, 32)
            >>> layer = PackedLinearLayer.from_float(linear, "w6g32")
            >>> x = torch.randn(4, 64)
            >>> bool((layer(x) - linear(x)).abs().max() < 0.1)
            True
        """
        options = {"nonfinite": nonfinite, "name": name, **fitting}
        return cls._of_float(linear, {"scheme": scheme, "device": "meta"}, **options)

    @classmethod
    def from_packed(cls, packed: PackedWeights, bias: torch.Tensor | None = None) -> Self:
        """The layer of weights that are packed already; it holds their tensors, not copies.

        Args:
            packed: of torch tensors.
            bias: floats ``[out_features]``, or None.

        Raises:
            TypeError: if ``packed`` is none, or holds ndarrays; or for a bias of other numbers.
            ValueError: if the bias has another shape, an order lacks a column, or a multiplier is
                not finite.

        Example:
            >>> from quantization import pack_matrix
            >>> PackedLinearLayer.from_packed(pack_matrix(torch.eye(8), "w2a")).weight[0, :2]
            tensor([1., 0.])
        """
        check_packed(packed)
        check_columns({name: getattr(packed, name) for name in COLUMN_PARTS})
        check_bias(bias, packed.shape[0])
        (out_features, in_features), dtype = packed.shape, getattr(torch, packed.dtype)
        has_bias = bias is not None
        layer = cls(in_features, out_features, has_bias, packed.scheme, dtype, device="meta")
        layer._set_buffers(layer._parts_of(packed), packed.shape)
        layer.bias = bias
        return layer

    def forward(self, input: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """``input @ weight.T + bias`` in one native call, without making the float weight.

        On devices that have no kernels, the weight is made in float for the time of the call.

        Args:
            input: float32, bfloat16, float16 or float64, ``[..., in_features]``.
            out_dtype: of the result, one of those; None: that of ``input`` (under autocast, that of
                autocast).

        Returns:
            ``[..., out_features]``.

        Raises:
            RuntimeError: if the last dimension of ``input`` is not ``in_features``.
        """
        buffers = self._buffers  # one look-up in place of one an attribute, 0.5 us each
        return _checked_linear(
            input,
            self.in_features,
            buffers.get("input_order"),
            buffers.get("input_scale"),
            buffers["packed_weights"],
            buffers["scales"],
            buffers["scale_steps"],
            buffers["zero_points"],
            buffers["codebook"],
            buffers["bias"] if "bias" in buffers else self._parameters["bias"],
            self._bits,
            self._group,
            out_dtype,
        )


@torch.fx.wrap
def _checked_linear(
    input: torch.Tensor,
    in_features: int,
    order: torch.Tensor | None,
    multipliers: torch.Tensor | None,
    *rest: Any,
) -> torch.Tensor:
    """The operator, which reads the length of a row off its input: others may fit the bytes too."""
    if input.size(-1) != in_features:
        raise RuntimeError(
            f"input has {input.size(-1)} features in its last dimension, this layer {in_features}"
        )
    if order is not None:
        input = input.index_select(-1, order)
    if multipliers is not None:
        input = (input * multipliers).to(input.dtype)
    return torch_ops.packed_linear(input, *rest)
