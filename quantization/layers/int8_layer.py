"""The linear layer with int8 weights and float activations (W8A16).

``y = x (int8_weights * scales[:, None])^T + bias``: one scale a row of weights, activations never
quantized.
"""

from __future__ import annotations

import logging
from typing import Any, Self

import torch
from torch import nn

from quantization.forks import alone
from quantization.layers.quantized_linear import QuantizedLinear, accepted, check_bias
from quantization.layers.quantized_module import check_packed
from quantization.numerics.granularity import Granularity
from quantization.numerics.linear_quantization import quantize_linear
from quantization.ops import torch_ops
from quantization.ops.dtypes import target_of
from quantization.ops.packed_rows import round_once
from quantization.schemes.conversion import int8_parts
from quantization.schemes.layer_weights import check_weight
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme

__all__ = ["QWQALinearLayer", "name_for_quantized_weight_buffer"]


def name_for_quantized_weight_buffer(dtype: Any) -> str:
    """Name of the buffer that holds weights of a code type, as in a state dict.

    Raises:
        TypeError: if codes cannot have that type.

    Example:
        >>> name_for_quantized_weight_buffer(torch.int8)
        'int8_weights'
    """
    return f"{target_of(dtype).name}_weights"


_log = logging.getLogger(__name__)
_CODES = name_for_quantized_weight_buffer("int8")


class QWQALinearLayer(QuantizedLinear, form="int8"):
    """A linear layer that keeps its weight as int8 codes with one scale a row.

    A subclass of nn.Linear, so that libraries see one, but with buffers only and no Parameters:
    ``int8_weights`` (int8, ``[out_features, in_features]``), ``scales`` (the layer's dtype,
    ``[out_features]``) and ``bias`` (``[out_features]``, or None). Gradients flow to the input.
    Assigning an nn.Parameter to ``bias`` makes the bias trainable.

    A fresh layer is initialised as nn.Linear is, with the same random numbers, and quantized; on
    the meta device it has shapes only. ``.to(dtype)`` casts scales and bias, never the codes; a
    layer of the final dtype quantized anew is a little more exact than one cast to it.

    Args:
        in_features: length of an input row; may be 0.
        out_features: length of an output row; may be 0.
        bias: whether there is a bias.
        dtype: of scales and bias: float32, bfloat16, float16 or float64. Activations may have
            another dtype than the layer; the result has theirs.
        device: of the buffers; None: torch's current default.

    Raises:
        TypeError: for another dtype, or a number of features that is no integer.
        ValueError: for a negative number of features.

    Example:
        >>> layer = QWQALinearLayer(16, 32)
        >>> layer(torch.randn(4, 16)).shape
        torch.Size([4, 32])
        >>> layer
        QWQALinearLayer(in_features=16, out_features=32, bias=True, dtype=float32, weights=int8 \
per row, 768 bytes)
    """

    int8_weights: torch.Tensor
    scales: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | int | None = None,
    ) -> None:
        offsets = self._init_linear(in_features, out_features, bias, dtype, device)
        shape = (out_features, in_features)
        self.register_buffer(_CODES, torch.empty(shape, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.empty(out_features, dtype=dtype, device=device))
        self.register_buffer("bias", offsets)
        self.reset_parameters()

    @classmethod
    def from_float(
        cls, linear: nn.Module, *, nonfinite: str = "raise", name: str = "weight"
    ) -> Self:
        """The quantized layer of a float one, which is left as it is.

        Args:
            linear: an nn.Linear, or a Conv1D of transformers (whose weight is [in, out]); of
                float32, bfloat16, float16 or float64, on any device including meta.
            nonfinite: as for :meth:`quantize`.
            name: what error messages call the weight.

        Returns:
            A layer of the weight's dtype and device and of the training flag of ``linear``; its
            bias shares memory with that of ``linear``. Out of a Conv1D it goes on to take float
            checkpoints as those have it, [in, out]. Hooks stay behind;
            :func:`replace_linear_layers_with_w8a16` carries them over.

        Raises:
            TypeError: if ``linear`` cannot be converted; the message says why.
            ValueError: for a NaN or infinity in the weight, with its index.

        Example:
            >>> linear = nn.Linear(16, 32)
            >>> layer = QWQALinearLayer.from_float(linear)
            >>> x = torch.randn(4, 16)
            >>> bool((layer(x) - linear(x)).abs().max() < 0.05)
            True
        """
        is_own = cls.__init__ is QWQALinearLayer.__init__  # no random numbers where none are needed
        options = accepted(cls.quantize, nonfinite=nonfinite, name=name)
        return cls._of_float(linear, {"device": "meta"} if is_own else {}, **options)

    @classmethod
    def from_packed(cls, packed: PackedWeights, bias: torch.Tensor | None = None) -> Self:
        """The int8 layer of exactly the weight that is packed already.

        Args:
            packed: of torch tensors. Under ``Scheme.int8()`` the layer holds them, not copies.
            bias: floats ``[out_features]``, or None.

        Raises:
            TypeError: if ``packed`` is none, or holds ndarrays; or for a bias of other numbers.
            ValueError: where there is none: a row has several scales, or a code stands for no whole
                number of -128..127; or if the bias has another shape.

        Example:
            >>> layer = QWQALinearLayer(16, 32)
            >>> again = QWQALinearLayer.from_packed(layer.packed(), layer.bias)
            >>> again.int8_weights.data_ptr() == layer.int8_weights.data_ptr()
            True
        """
        check_packed(packed)
        codes, scales = int8_parts(packed)
        check_bias(bias, packed.shape[0])
        (rows, cols), dtype = packed.shape, getattr(torch, packed.dtype)
        layer = cls(cols, rows, False, dtype, device="meta")
        layer._set_buffers({_CODES: codes, "scales": scales}, packed.shape)
        layer.bias = bias
        return layer

    def packed(self) -> PackedWeights:
        """The weight as a value, under ``Scheme.int8()``: the layer's own tensors, not copied.

        Example:
            >>> QWQALinearLayer(16, 32).packed().scales.shape
            torch.Size([32, 1])
        """
        codes, scales = self._buffers[_CODES], self._buffers["scales"]
        return PackedWeights(
            Scheme.int8(),
            self._weight_shape(),
            codes.view(torch.uint8),
            scales.unsqueeze(1),
            dtype=scales.dtype,
        )

    def quantize(
        self, weights: torch.Tensor, *, nonfinite: str = "raise", name: str = "weights"
    ) -> None:
        """Give the layer other weights: one symmetric scale a row, codes -127..127.

        scale = max|row| / 127, rounded to the layer's dtype before the codes are made;
        code = round_half_even(weight / scale). A row of zeros has scale 1 and codes 0.

        Args:
            weights: ``[out_features, in_features]``, float32, bfloat16, float16 or float64, in any
                memory layout, on any device including meta; codes, scales and bias come to live
                there. Another shape is taken too: the layer's sizes follow, and a bias of another
                length, which cannot belong to these weights, becomes zeros.
            nonfinite: ``"raise"``, or ``"mark"``: a row with a NaN or infinity gets scale NaN, so
                that its outputs are NaN and no others.
            name: what error messages call the tensor.

        Raises:
            TypeError: if ``weights`` is not a float tensor.
            ValueError: if it has not two dimensions, or holds a NaN or infinity (with its index).
                The layer is then as it was.

        Example:
            >>> layer = QWQALinearLayer(2, 1, bias=False)
            >>> layer.quantize(torch.tensor([[1.27, -0.5], [0.0, 0.0]]))
            >>> layer.int8_weights, layer.scales
            (tensor([[127, -50],
                    [  0,   0]], dtype=torch.int8), tensor([0.0100, 1.0000]))
        """
        self._set_buffers(
            self._buffers_of(weights, self.dtype, nonfinite, name), tuple(weights.shape)
        )
        self.method = "rtn"
        if _log.isEnabledFor(logging.DEBUG) and self.int8_weights.numel():
            for tokens in (1, 128):
                _log.debug("%s [%d, %d]: %s", name, *self._weight_shape(), self.kernel(tokens))

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
        bias = buffers["bias"] if "bias" in buffers else self._parameters["bias"]
        return torch_ops.linear(input, buffers[_CODES], buffers["scales"], bias, out_dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of scales, bias and weight."""
        scales: torch.Tensor = self._buffers["scales"]
        return scales.dtype

    def _decoded(self) -> torch.Tensor:
        scales: torch.Tensor = self._buffers["scales"]
        with alone():
            return round_once(self.codes.to(scales.dtype) * scales.unsqueeze(1), scales.dtype)

    @property
    def codes(self) -> torch.Tensor:
        """The int8 codes ``[out_features, in_features]``: the buffer itself, not a copy."""
        codes: torch.Tensor = self._buffers[_CODES]
        return codes

    def _weight_names(self) -> tuple[str, ...]:
        return _CODES, "scales"

    def _buffers_of(
        self, weights: Any, dtype: torch.dtype, nonfinite: str, name: str
    ) -> dict[str, torch.Tensor | None]:
        """Codes [out, in] and scales [out] of that dtype."""
        weights = check_weight(weights, name)
        with torch.inference_mode(False), torch.no_grad(), alone():
            codes, params = quantize_linear(
                weights,
                torch.int8,
                Granularity.PerDimension(1),
                scale_dtype=dtype,
                nonfinite=nonfinite,
                name=name,
            )
            return {_CODES: codes, "scales": params.scale.reshape(-1).to(dtype)}
