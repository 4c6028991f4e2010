"""What layers with quantized weights have in common, whatever the form of their codes.

:class:`QuantizedModule` is a module whose weight is codes in buffers: the weight is a view that
cannot be assigned, a float checkpoint is quantized as it comes in, and one that does not fit is
refused before anything is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from quantization.layers.weight_view import READ_ONLY, WeightView, can_be_viewed
from quantization.ops.dtypes import index_of, name_of, source_of
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme


class QuantizedModule(nn.Module):
    """A module whose weight is held as codes, with what belongs to them, in buffers.

    A subclass says which buffers those are (:meth:`_weight_names`), makes them of a float weight
    (:meth:`_buffers_of`), holds others (:meth:`_set_buffers`), and says what float module it stands
    for (:meth:`_float_module`) and what value it is (:meth:`packed`); ``dtype`` is that of its
    floats, ``weight`` what the codes stand for.
    """

    #: Attributes of instances that mean nothing to a layer of another kind.
    OWN_ATTRIBUTES: ClassVar[frozenset[str]] = frozenset({"was_conv1d", "method"})

    #: Whether it came from a Conv1D of transformers, whose checkpoints have weights [in, out].
    was_conv1d: bool = False

    #: By which its codes were found, by name; empty where nobody knows.
    method: str = ""

    _buffers: dict[str, Any]
    _scheme: Scheme | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's floats: scales, bias and whatever :attr:`weight` gives."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        """The weight that the codes stand for, which can be read and not written.

        A float matrix of the layer's dtype, on its device; no gradient. It knows dtype, shape and
        device at no cost; its numbers are computed, once for each reading of this attribute, when
        an operator, NumPy or a copy asks for them. Libraries read it; ``forward`` does not. A copy
        that can be written is ``layer.weight.clone()``.

        Raises:
            RuntimeError: at a write in place, ``layer.weight.data`` included.

        Example:
            >>> from quantization import PackedLinearLayer
            >>> layer = PackedLinearLayer(2, 1, dtype=torch.bfloat16)
            >>> layer.weight.dtype, layer.weight.shape
            (torch.bfloat16, torch.Size([1, 2]))
            >>> layer.weight.zero_()  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ...
            RuntimeError: the weight of a quantized layer is computed from its codes and cannot ...
        """
        codes = self._buffers[self._weight_names()[0]]
        if not can_be_viewed(codes):
            return self._decoded_in_torch()
        return WeightView(self._held()._decoded, self._weight_shape(), self.dtype, codes.device)

    @weight.setter
    def weight(self, value: Any) -> None:
        if not isinstance(value, torch.Tensor) or value.is_meta:
            raise AttributeError(READ_ONLY)
        own = self._decoded()
        if value.dtype != own.dtype or not torch.equal(value, own):  # the numbers it has may come
            raise AttributeError(READ_ONLY)

    def _held(self) -> Any:
        """A layer of the tensors that this one has now, whatever it is given later."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _buffers=dict(self._buffers))
        return twin

    def _decoded(self) -> torch.Tensor:
        """The numbers of :attr:`weight`."""
        raise NotImplementedError

    def _decoded_in_torch(self) -> torch.Tensor:
        """The same by operators of torch alone, for compilers and transforms."""
        return self._decoded()

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

    def _set_buffers(self, buffers: dict[str, torch.Tensor | None], shape: tuple[int, ...]) -> None:
        """Hold those buffers, which are of a weight of that shape."""
        for name, tensor in buffers.items():
            self._buffers[name] = tensor

    def _float_module(self, device: Any, dtype: torch.dtype) -> nn.Module:
        """A fresh float module of the sizes of this one."""
        raise NotImplementedError

    def packed(self) -> PackedWeights:
        """The weight as a value, of the layer's own tensors, not copied."""
        raise NotImplementedError

    @property
    def codes(self) -> torch.Tensor:
        """The stored codes as integers in the layout of the weight, unpacked anew at each reading.

        ``[out_features, in_features]`` (of an embedding ``[num_embeddings, embedding_dim]``): int8
        where codes are signed, uint8 where they count from a zero point or are places in a
        codebook; ``scales`` beside them are as they are stored.

        Example:
            >>> from quantization import PackedLinearLayer, QWQALinearLayer
            >>> layer = PackedLinearLayer(100, 8, scheme="w3g32a")
            >>> layer.codes.shape, layer.codes.dtype, int(layer.codes.max())
            (torch.Size([8, 100]), torch.uint8, 7)
            >>> QWQALinearLayer(100, 8).codes.dtype
            torch.int8
        """
        codes: torch.Tensor = self.packed().codes
        return codes

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in nn.Module, but a weight is refused.

        Raises:
            AttributeError: for the name ``weight``.
        """
        if name == "weight":
            raise AttributeError(READ_ONLY)
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

    # ---- from and to float -------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Draw numbers as the float module does, and quantize them; on meta, do nothing."""
        device = self._buffers[self._weight_names()[0]].device
        if device.type == "meta":
            return
        fresh: Any = self._float_module(device, self.dtype)
        buffers = self._buffers_of(fresh.weight.detach(), self.dtype, "raise", "weights")
        self._set_buffers(buffers, self._weight_shape())
        bias = getattr(self, "bias", None)
        if bias is not None:
            bias.detach().copy_(fresh.bias.detach())

    def dequantize(self) -> nn.Module:
        """The float module of the numbers that the codes stand for; this one is left as it is.

        Returns:
            An nn.Linear or nn.Embedding of the layer's dtype, device and training flag, with
            Parameters of its own. Hooks stay behind; :func:`quantization.dequantize_model` carries
            them over.

        Example:
            >>> from quantization import PackedEmbedding, QWQALinearLayer
            >>> layer = QWQALinearLayer(16, 32)
            >>> linear, x = layer.dequantize(), torch.randn(4, 16)
            >>> type(linear).__name__, bool((layer(x) - linear(x)).abs().max() < 1e-5)
            ('Linear', True)
            >>> table = PackedEmbedding(10, 64)
            >>> bool((table.dequantize().weight == table.weight).all())
            True
        """
        module = self._float_module("meta", self.dtype)
        with torch.inference_mode(False):
            module.weight = nn.Parameter(self._decoded())
            bias = getattr(self, "bias", None)
            if bias is not None:
                module.bias = nn.Parameter(bias.detach().clone())
        return module.train(self.training)

    # ---- loading -----------------------------------------------------------------------------

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As nn.Module does, but a float ``weight`` is quantized, and no type is ever cast to int.

        A checkpoint that does not fit adds to ``error_msgs`` and leaves this layer as it was.
        """
        own = {
            key: value.detach() if isinstance(value, torch.Tensor) else value
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
        codes = prefix + self._weight_names()[0]
        had_codes = codes in own
        try:
            self._quantize_incoming(own, prefix, local_metadata.get("assign_to_params_buffers"))
            self._check_incoming(own, prefix)
        except (TypeError, ValueError) as error:
            error_msgs.append(str(error))
            return
        if codes in own:
            self.method = "" if had_codes else "rtn"
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _quantize_incoming(self, own: dict[str, Any], prefix: str, assign: bool | None) -> None:
        """Put codes and scales in the place of a float weight among the layer's own entries."""
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
        shape = self._weight_shape()
        check_incoming(weight, key, shape[::-1] if self.was_conv1d else shape)
        weight = weight.t() if self.was_conv1d else weight
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


def check_packed(packed: Any) -> None:
    """Raise TypeError unless it is a packed matrix of torch tensors.

    Example:
        >>> check_packed("w4")
        Traceback (most recent call last):
        ...
        TypeError: packed is a str; pack_matrix makes one
    """
    if not isinstance(packed, PackedWeights):
        raise TypeError(f"packed is a {type(packed).__name__}; pack_matrix makes one")
    if not isinstance(packed.packed_weights, torch.Tensor):
        raise TypeError("packed holds ndarrays; pack a torch.Tensor")


def check_sizes(**sizes: Any) -> None:
    """Raise TypeError or ValueError unless all are whole numbers of 0 or more.

    Example:
        >>> check_sizes(in_features=-1)
        Traceback (most recent call last):
        ...
        ValueError: in_features is -1; it must be 0 or more
    """
    for name, value in sizes.items():
        if index_of(value, name) < 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more")


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
