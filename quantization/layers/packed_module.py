"""What a packed linear layer and a packed embedding share: the buffers, and their scheme."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from quantization.layers.quantized_module import QuantizedModule, check_weight
from quantization.ops.dtypes import name_of
from quantization.schemes.packed_weights import PackedWeights, pack_matrix
from quantization.schemes.scheme import Scheme, scheme_of

#: Names of the buffers, in the order in which the operator takes them.
BUFFERS = ("packed_weights", "scales", "scale_steps", "zero_points", "codebook")
DEFAULT_SCHEME = "w4g64a"


class PackedModule(QuantizedModule):
    """A module whose weight is a :class:`quantization.PackedWeights` spread out in buffers.

    Buffers that the scheme has no use for are None. Floats follow the layer's dtype, except where
    the scheme gives the scales a type of their own and for the float32 steps of double
    quantization: these keep theirs whatever the layer is cast to.
    """

    OWN_ATTRIBUTES = frozenset({"_scheme", "_dtype", "_floats", "_bits", "_group", "nf"})

    packed_weights: torch.Tensor
    scales: torch.Tensor
    scale_steps: torch.Tensor | None
    zero_points: torch.Tensor | None
    codebook: torch.Tensor | None

    def _begin_packed(
        self, scheme: Scheme | str, dtype: torch.dtype, device: Any, **more: torch.Tensor | None
    ) -> None:
        """Register the buffers, uninitialised, and more of them."""
        self._scheme = scheme_of(scheme)
        self._dtype = dtype
        self._floats = _following(self._scheme)
        shape = self._weight_shape()
        tensors: dict[str, torch.Tensor | None] = dict.fromkeys(BUFFERS)
        for name, form in self._scheme.buffers(shape, dtype).items():
            kind = getattr(torch, form.dtype)
            tensors[name] = torch.empty(form.shape, dtype=kind, device=device)
        tensors |= more
        # torch.export counts the buffers of a root module as if none before the last were None
        for name in sorted(tensors, key=lambda name: tensors[name] is None):
            self.register_buffer(name, tensors[name])
        self._measure(shape)

    def _measure(self, shape: tuple[int, int]) -> None:
        """What the operator is told beside the buffers."""
        self._bits, self._group, *_ = self._scheme.kernel_numbers(shape[1])

    @property
    def scheme(self) -> Scheme:
        """How the weight is stored; :meth:`to_scheme` gives a layer of another one.

        Example:
            >>> from quantization import PackedLinearLayer
            >>> str(PackedLinearLayer(64, 32, scheme="nf4", device="meta").scheme)
            'nf4g64'
        """
        return self._scheme

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's floats: bias, codebook, and scales unless the scheme gives them another.

        Example:
            >>> from quantization import PackedLinearLayer
            >>> PackedLinearLayer(64, 32, dtype=torch.bfloat16).dtype
            torch.bfloat16
        """
        for name in (*self._floats, "bias"):
            tensor = getattr(self, name, None)
            if tensor is not None:
                return tensor.dtype
        return self._dtype

    @QuantizedModule.weight.getter
    def weight(self) -> torch.Tensor:
        """The weight that the codes stand for, computed anew at each reading.

        A float matrix of the layer's dtype, on its device; no gradient. Libraries read it (for its
        dtype and device, or as a whole); forward does not.

        Example:
            >>> from quantization import PackedLinearLayer
            >>> layer = PackedLinearLayer(2, 1, dtype=torch.bfloat16)
            >>> layer.weight.dtype, layer.weight.shape
            (torch.bfloat16, torch.Size([1, 2]))
        """
        return self.packed().dequantize(name_of(self.dtype))

    def packed(self) -> PackedWeights:
        """The weight as a value: scheme, shape, and the layer's own tensors, not copied.

        Example:
            >>> from quantization import PackedLinearLayer
            >>> PackedLinearLayer(64, 32).packed().packed_weights.shape
            torch.Size([32, 32])
        """
        parts = {name: self._buffers[name] for name in BUFFERS}
        return PackedWeights(self._scheme, self._weight_shape(), **parts, dtype=self.dtype)

    def _weight_names(self) -> tuple[str, ...]:
        return BUFFERS

    def _buffers_of(
        self, weights: Any, dtype: torch.dtype, nonfinite: str, name: str, importance: Any = None
    ) -> dict[str, torch.Tensor | None]:
        packed = pack_as(
            weights, self._scheme, dtype, importance=importance, nonfinite=nonfinite, name=name
        )
        return self._parts_of(packed)

    @staticmethod
    def _parts_of(packed: PackedWeights) -> dict[str, torch.Tensor | None]:
        return {part: getattr(packed, part) for part in BUFFERS}

    def _take(self, buffers: dict[str, torch.Tensor | None], shape: tuple[int, int]) -> None:
        super()._take(buffers, shape)
        self._measure(shape)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """As in nn.Module, but buffers whose type the scheme says keep their type."""
        probe = torch.empty(1, dtype=self.dtype, device=self.scales.device)
        fixed = {
            name: tensor
            for name, tensor in self._buffers.items()
            if name in BUFFERS
            and name not in self._floats
            and tensor is not None
            and tensor.is_floating_point()
        }
        super()._apply(fn, recurse)
        self._dtype = fn(probe).dtype
        for name, tensor in fixed.items():
            moved = self._buffers[name]
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def _check_incoming(self, own: dict[str, Any], prefix: str) -> None:
        """As in QuantizedModule; and buffers of another scheme are refused."""
        foreign = [name for name in ("int8_weights", *BUFFERS) if self._buffers.get(name) is None]
        for name in foreign:
            if prefix + name in own:
                raise ValueError(
                    f"{prefix}{name} is there, and scheme {self._scheme} has no such tensor: the "
                    "checkpoint is of another scheme; build the layer with that one"
                )
        try:
            super()._check_incoming(own, prefix)
        except ValueError as error:
            raise ValueError(f"{error} (this layer has scheme {self._scheme})") from None
        self._check_codebook(own.get(prefix + "codebook"), prefix)

    def _check_codebook(self, incoming: torch.Tensor | None, prefix: str) -> None:
        """The levels of a grid that fixes them are those of the scheme."""
        if incoming is None or incoming.is_meta or self._scheme.grid == "kmeans":
            return
        levels = pack_matrix(torch.zeros(1, 1), self._scheme).codebook
        given = incoming.detach().float().to(levels.device)
        if not torch.allclose(given, levels, rtol=1 / 64, atol=0.0):  # bfloat16 keeps 8 bits
            raise ValueError(
                f"{prefix}codebook has other levels than scheme {self._scheme}: the checkpoint is "
                "of another scheme; build the layer with that one"
            )


def pack_as(
    weights: Any,
    scheme: Scheme,
    dtype: torch.dtype,
    *,
    importance: torch.Tensor | None = None,
    nonfinite: str = "raise",
    name: str = "weights",
) -> PackedWeights:
    """:func:`quantization.pack_matrix` for a layer of another dtype than the weights.

    The scales are rounded to the layer's dtype before the codes are made; other floats after it.

    Example:
        >>> pack_as(torch.ones(2, 3), Scheme(4), torch.bfloat16).scales.dtype
        torch.bfloat16
    """
    weights = check_weight(weights, name)
    options = {"importance": importance, "nonfinite": nonfinite, "name": name}
    with torch.inference_mode(False), torch.no_grad():
        if weights.dtype == dtype:
            return pack_matrix(weights, scheme, **options)
        made_for = scheme
        if "scales" in _following(scheme):
            made_for = dataclasses.replace(scheme, scale_dtype=name_of(dtype))
        packed = pack_matrix(weights, made_for, **options)
        parts = {part: getattr(packed, part) for part in BUFFERS}
        for part in _following(scheme):
            parts[part] = parts[part].to(dtype)
        return PackedWeights(scheme, packed.shape, **parts, dtype=dtype)


def _following(scheme: Scheme) -> tuple[str, ...]:
    """Which float buffers have the layer's dtype."""
    wide, narrow = (scheme.buffers((1, 1), dtype) for dtype in ("float64", "float32"))
    return tuple(name for name in wide if wide[name] != narrow[name])
