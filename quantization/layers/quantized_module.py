"""What layers with quantized weights have in common, whatever the form of their codes.

:class:`QuantizedModule` is a module whose weight is codes in buffers: the weight is a view that
cannot be assigned, a float checkpoint is quantized as it comes in, and one that does not fit is
refused before anything is copied. :class:`QuantizedLinear` is the linear layer of that kind.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from quantization.ops.dtypes import index_of, name_of, source_of
from quantization.swap.walker import is_conv1d

_READ_ONLY = (
    "the weight of a quantized layer is computed from its codes and cannot be assigned; "
    "call layer.quantize(weights) to give it other numbers"
)


class QuantizedModule(nn.Module):
    """A module whose weight is held as codes, with what belongs to them, in buffers.

    A subclass says which buffers those are (:meth:`_weight_names`), makes them of a float weight
    (:meth:`_buffers_of`) and takes them for its own (:meth:`_take`); ``dtype`` is that of its
    floats, ``weight`` what the codes stand for.
    """

    #: Attributes of instances that mean nothing to a layer of another kind.
    OWN_ATTRIBUTES: ClassVar[frozenset[str]] = frozenset({"nf"})

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's floats: scales, bias and whatever :attr:`weight` gives."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        """What the codes stand for, computed anew at each reading."""
        raise NotImplementedError

    @weight.setter
    def weight(self, value: Any) -> None:
        if not isinstance(value, torch.Tensor) or value.is_meta:
            raise AttributeError(_READ_ONLY)
        own = self.weight
        if value.dtype != own.dtype or not torch.equal(value, own):  # the numbers it has may come
            raise AttributeError(_READ_ONLY)

    def _weight_names(self) -> tuple[str, ...]:
        """Names of the buffers that make the weight, the codes first."""
        raise NotImplementedError

    def _buffers_of(
        self, weights: Any, dtype: torch.dtype, nonfinite: str, name: str
    ) -> dict[str, torch.Tensor | None]:
        """Those buffers, made of a float weight.

        Raises:
            TypeError: if ``weights`` is not a float tensor.
            ValueError: if it has not two dimensions, or holds a NaN or infinity.
        """
        raise NotImplementedError

    def _take(self, buffers: dict[str, torch.Tensor | None], shape: tuple[int, int]) -> None:
        """Hold those buffers, which are of a weight of that shape."""
        for name, tensor in buffers.items():
            self._buffers[name] = tensor

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in nn.Module, but a weight is refused.

        Raises:
            AttributeError: for the name ``weight``.
        """
        if name == "weight":
            raise AttributeError(_READ_ONLY)
        super().register_parameter(name, param)

    @property
    def footprint(self) -> int:
        """Bytes that the layer's buffers take, with those of a bias.

        Example:
            >>> from quantization import QWQALinearLayer
            >>> QWQALinearLayer(16, 32).footprint  # 16 * 32 codes, 32 scales and biases of 4 bytes
            768
        """
        bias = getattr(self, "bias", None)
        return self.nbytes + (0 if bias is None else bias.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes: codes, scales and whatever else it is computed from.

        Example:
            >>> from quantization import QWQALinearLayer
            >>> QWQALinearLayer(16, 32).nbytes  # 16 * 32 codes, 32 scales of 4 bytes
            640
        """
        tensors = (self._buffers[name] for name in self._weight_names())
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def _weight_shape(self) -> tuple[int, int]:
        raise NotImplementedError

    @property
    def bits_per_weight(self) -> float:
        """Bits of memory for each number of the weight, with its share of scales; 0 if empty.

        Example:
            >>> from quantization import QWQALinearLayer
            >>> QWQALinearLayer(1024, 32, dtype=torch.bfloat16).bits_per_weight
            8.015625
        """
        rows, cols = self._weight_shape()
        return 8 * self.nbytes / (rows * cols) if rows * cols else 0.0

    # ---- loading -----------------------------------------------------------------------------

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """As nn.Module does, but a float ``weight`` is quantized, and no type is ever cast to int.

        A checkpoint that does not fit adds to ``error_msgs`` and leaves this layer as it was.
        """
        own = {
            key: value.detach() if isinstance(value, torch.Tensor) else value
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
        try:
            self._take_float_weight(own, prefix, local_metadata.get("assign_to_params_buffers"))
            self._check_incoming(own, prefix)
        except (TypeError, ValueError) as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _take_float_weight(self, own: dict[str, Any], prefix: str, assign: bool | None) -> None:
        """Put codes and scales in the place of a float weight among the layer's own entries.

        A layer that came from a Conv1D has its attribute ``nf``, and finds the weight turned.
        """
        key = prefix + "weight"
        if key not in own:
            return
        names = self._weight_names()
        if any(prefix + name in own for name in names):
            if is_placeholder(own[key]):
                del own[key]
                return
            rivals = " or ".join(prefix + name for name in names)
            raise ValueError(f"{key} is there beside {rivals}: keep one of them")
        weight = own.pop(key)
        is_turned, shape = "nf" in self.__dict__, self._weight_shape()
        check_incoming(weight, key, shape[::-1] if is_turned else shape)
        weight = weight.t() if is_turned else weight
        dtype = weight.dtype if assign else self.dtype
        buffers = self._buffers_of(weight, dtype, "raise", key)
        own |= {prefix + name: value for name, value in buffers.items() if value is not None}

    def _check_incoming(self, own: dict[str, Any], prefix: str) -> None:
        """Shapes and kinds of number of the layer's own entries, before any is copied."""
        needed = {n: b for n in self._weight_names() if (b := self._buffers[n]) is not None}
        here = [prefix + name for name in needed if prefix + name in own]
        lost = [prefix + name for name in needed if prefix + name not in own]
        if here and lost:
            raise ValueError(
                f"{here[0]} is there without {', '.join(lost)}: codes mean nothing without scales"
            )
        for name, buffer in needed.items() if here else ():
            key = prefix + name
            codes = None if buffer.is_floating_point() else buffer.dtype
            check_incoming(own[key], key, tuple(buffer.shape), codes)
        bias = getattr(self, "bias", None)
        if bias is not None and prefix + "bias" in own:
            check_incoming(own[prefix + "bias"], prefix + "bias", tuple(bias.shape))


class QuantizedLinear(QuantizedModule, nn.Linear):
    """A linear layer of quantized weights: a subclass of nn.Linear, so that libraries see one.

    It holds buffers only and no Parameters; the bias may be made one.
    """

    def _begin(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        """The checks of a constructor, and what comes before the buffers."""
        source_of(dtype, "a quantized layer")
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if index_of(value, name) < 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more")
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features

    def reset_parameters(self) -> None:
        """Draw a weight and a bias as nn.Linear does, and quantize; on meta, do nothing."""
        device = self._buffers[self._weight_names()[0]].device
        if device.type == "meta":
            return
        fresh = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=device,
            dtype=self.dtype,
        )
        buffers = self._buffers_of(fresh.weight.detach(), self.dtype, "raise", "weights")
        self._take(buffers, self._weight_shape())
        if self.bias is not None:
            self.bias.detach().copy_(fresh.bias.detach())

    def dequantize(self) -> nn.Linear:
        """The float layer of the numbers that the codes stand for; this one is left as it is.

        Returns:
            An nn.Linear of the layer's dtype, device and training flag, with Parameters of its own.
            Hooks stay behind; :func:`quantization.dequantize_model` carries them over.

        Example:
            >>> from quantization import QWQALinearLayer
            >>> layer = QWQALinearLayer(16, 32)
            >>> linear, x = layer.dequantize(), torch.randn(4, 16)
            >>> type(linear).__name__, bool((layer(x) - linear(x)).abs().max() < 1e-5)
            ('Linear', True)
        """
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        with torch.inference_mode(False):
            linear.weight = nn.Parameter(self.weight)
            if self.bias is not None:
                linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _dress(self, linear: nn.Module, bias: torch.Tensor | None) -> None:
        """Take the bias and the training flag of the layer that this one comes from."""
        self.bias = bias
        if is_conv1d(linear):
            self.nf = linear.nf  # a mark for _take_float_weight
        self.train(linear.training)

    def _take(self, buffers: dict[str, torch.Tensor | None], shape: tuple[int, int]) -> None:
        self.bias = bias_beside(buffers[self._weight_names()[0]], self.bias)
        super()._take(buffers, shape)
        self.out_features, self.in_features = shape


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


def placeholder() -> torch.Tensor:
    """What files have under the name of a float weight that is codes: no numbers, uint8 ``[0, 0]``.

    A loader that knows nothing of codes stops at its shape, and does not go on without a weight.

    Example:
        >>> is_placeholder(placeholder())
        True
    """
    return torch.empty((0, 0), dtype=torch.uint8, device="cpu")


def is_placeholder(value: Any) -> bool:
    """Whether it is a :func:`placeholder`.

    Example:
        >>> is_placeholder(torch.ones(0, 0))
        False
    """
    is_bytes = isinstance(value, torch.Tensor) and value.dtype is torch.uint8
    return is_bytes and tuple(value.shape) == (0, 0)


def check_weight(weights: Any, name: str) -> torch.Tensor:
    """``weights``, if it is a matrix; its dtype is left to what quantizes it.

    Raises:
        TypeError: if it is no tensor.
        ValueError: if it has not two dimensions.
    """
    if not isinstance(weights, torch.Tensor):
        raise TypeError(f"{name} is a {type(weights).__name__}; expected a float torch.Tensor")
    if weights.ndim != 2:
        raise ValueError(
            f"{name} has shape {tuple(weights.shape)}; expected [out_features, in_features]"
        )
    return weights.detach()


def check_incoming(
    value: Any, key: str, shape: tuple[int, ...], codes: torch.dtype | None = None
) -> None:
    """Whether an entry of a state dict fits: its shape, and floats, or codes of that dtype.

    Raises:
        TypeError: if it is no tensor, or one of other numbers.
        ValueError: for another shape.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{key} is a {type(value).__name__}; expected a torch.Tensor")
    if tuple(value.shape) != shape:
        raise ValueError(
            f"size mismatch for {key}: the checkpoint has shape {tuple(value.shape)}, "
            f"this layer {shape}"
        )
    if codes is None:
        source_of(value.dtype, key)
    elif value.dtype is not codes:
        float_key = key.removesuffix(key.rpartition(".")[2]) + "weight"
        raise TypeError(
            f"{key} has dtype {name_of(value.dtype)}; codes are {name_of(codes)}. A float weight "
            f"belongs under the key {float_key}, and is then quantized"
        )
