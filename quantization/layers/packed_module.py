"""What a packed linear layer and a packed embedding share: the buffers, and their scheme."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quantization.layers.quantized_module import QuantizedModule
from quantization.methods.registry import Method, fit_matrix, method_name
from quantization.methods.statistics import Statistics
from quantization.ops.dtypes import name_of
from quantization.ops.packed_rows import decode_rows, round_once
from quantization.schemes.column_order import check_columns
from quantization.schemes.layer_weights import layer_floats, pack_as
from quantization.schemes.packed_weights import OPERANDS, PARTS, PackedWeights, pack_matrix
from quantization.schemes.scheme import Scheme, scheme_of

DEFAULT_SCHEME = "w4g64a"


class PackedModule(QuantizedModule):
    """A module whose weight is a :class:`quantization.PackedWeights` spread out in buffers.

    Buffers that the scheme has no use for are None. Floats follow the layer's dtype, except where
    the scheme gives the scales a type of their own and for the float32 steps of double
    quantization: these keep theirs whatever the layer is cast to.
    """

    OWN_ATTRIBUTES = QuantizedModule.OWN_ATTRIBUTES | {
        "_scheme",
        "_dtype",
        "_floats",
        "_bits",
        "_group",
    }

    _scheme: Scheme
    packed_weights: torch.Tensor
    scales: torch.Tensor
    scale_steps: torch.Tensor | None
    zero_points: torch.Tensor | None
    codebook: torch.Tensor | None
    input_order: torch.Tensor | None
    input_scale: torch.Tensor | None

    def _register_packed(
        self, scheme: Scheme | str, dtype: torch.dtype, device: Any, **more: torch.Tensor | None
    ) -> None:
        """Register the buffers, uninitialised, and more of them."""
        self._scheme = scheme_of(scheme)
        self._dtype = dtype
        self._floats = layer_floats(self._scheme)
        shape = self._weight_shape()
        tensors: dict[str, torch.Tensor | None] = dict.fromkeys(PARTS)
        for name, form in self._scheme.buffers(shape, dtype).items():
            kind = getattr(torch, form.dtype)
            tensors[name] = torch.empty(form.shape, dtype=kind, device=device)
        tensors |= more
        # torch.export counts the buffers of a root module as if none before the last were None
        for name in sorted(tensors, key=lambda name: tensors[name] is None):
            self.register_buffer(name, tensors[name])
        self._set_kernel_numbers(shape)

    def _set_kernel_numbers(self, shape: tuple[int, ...]) -> None:
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
            tensor: torch.Tensor | None = getattr(self, name, None)
            if tensor is not None:
                return tensor.dtype
        return self._dtype

    def _decoded(self) -> torch.Tensor:
        weight: torch.Tensor = self.packed().dequantize(name_of(self.dtype))
        return weight

    def _decoded_in_torch(self) -> torch.Tensor:
        operands: list[Any] = [self._buffers[name] for name in OPERANDS]
        codes, scales, steps, zeros, book = operands
        numbers = (self._bits, self._group, self._weight_shape()[1])
        decoded = decode_rows(codes, scales, steps, zeros, book, *numbers)
        multipliers, order = self._buffers.get("input_scale"), self._buffers.get("input_order")
        decoded = decoded if multipliers is None else decoded * multipliers.float()
        decoded = decoded if order is None else decoded[:, order.argsort()]
        return round_once(decoded, self.dtype)

    def packed(self) -> PackedWeights:
        """The weight as a value: scheme, shape, and the layer's own tensors, not copied.

        Example:
            >>> from quantization import PackedLinearLayer
            >>> PackedLinearLayer(64, 32).packed().packed_weights.shape
            torch.Size([32, 32])
        """
        parts = {name: self._buffers.get(name) for name in PARTS}
        return PackedWeights(self._scheme, self._weight_shape(), **parts, dtype=self.dtype)

    def quantize(
        self,
        weights: torch.Tensor,
        *,
        nonfinite: str = "raise",
        name: str = "weights",
        importance: torch.Tensor | None = None,
        method: str | Method = "rtn",
        statistics: Statistics | None = None,
    ) -> None:
        """Give the layer other weights, packed under its scheme.

        Args:
            weights: a matrix in the layout of :attr:`weight`, float32, bfloat16, float16 or
                float64, in any memory layout, on any device including meta; the buffers come to
                live there. Another shape is taken too: the layer's sizes follow, and a bias of
                another length, which cannot belong to these weights, becomes zeros.
            nonfinite: ``"raise"``, or ``"mark"``: a group with a NaN or infinity gets scale NaN, so
                that what is computed from it is NaN and nothing else.
            name: what error messages call the tensor.
            importance: one number a column, how much its error counts, for schemes that choose by
                error; with another method, what its statistics are if there are none.
            method: how codes are found: ``"rtn"``, another of :func:`quantization.method_names`, or
                a function of that kind.
            statistics: of the layer's inputs, for methods that use them.

        Raises:
            TypeError: if ``weights`` is not a float tensor.
            ValueError: if it has not two dimensions, or holds a NaN or infinity (with its index).
                The layer is then as it was.

        Example:
            >>> from quantization import PackedLinearLayer
            >>> layer = PackedLinearLayer(2, 1, bias=False, scheme="w4a")
            >>> layer.quantize(torch.tensor([[0.0, 15.0], [0.0, 0.0]]))
            >>> layer.weight
            tensor([[ 0., 15.],
                    [ 0.,  0.]])
        """
        buffers = self._buffers_of(
            weights, self.dtype, nonfinite, name, importance, method, statistics
        )
        self._set_buffers(buffers, tuple(weights.shape))
        self.method = method_name(method)

    def _weight_names(self) -> tuple[str, ...]:
        return PARTS

    def _buffers_of(
        self,
        weights: Any,
        dtype: torch.dtype,
        nonfinite: str,
        name: str,
        importance: torch.Tensor | None = None,
        method: str | Method = "rtn",
        statistics: Statistics | None = None,
    ) -> dict[str, torch.Tensor | None]:
        options: dict[str, Any] = {"nonfinite": nonfinite, "name": name}
        if method == "rtn" and statistics is None:
            packed = pack_as(weights, self._scheme, dtype, importance=importance, **options)
            return self._parts_of(packed)
        if importance is not None and statistics is None:
            statistics = Statistics(importance.detach().double().cpu())
        options |= {"method": method, "statistics": statistics}
        return self._parts_of(pack_as(weights, self._scheme, dtype, pack=fit_matrix, **options))

    @staticmethod
    def _parts_of(packed: PackedWeights) -> dict[str, torch.Tensor | None]:
        return {part: getattr(packed, part) for part in PARTS}

    def _set_buffers(self, buffers: dict[str, torch.Tensor | None], shape: tuple[int, ...]) -> None:
        super()._set_buffers(buffers, shape)
        self._set_kernel_numbers(shape)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """As in nn.Module, but buffers whose type the scheme says keep their type."""
        probe = torch.empty(1, dtype=self.dtype, device=self.scales.device)
        fixed = {
            name: tensor
            for name, tensor in self._buffers.items()
            if name in PARTS
            and name not in self._floats
            and tensor is not None
            and tensor.is_floating_point()
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._dtype = fn(probe).dtype
        for name, tensor in fixed.items():
            moved = self._buffers[name]
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def _check_incoming(self, own: dict[str, Any], prefix: str) -> None:
        """As in QuantizedModule; and buffers of another scheme are refused."""
        foreign = [name for name in ("int8_weights", *PARTS) if self._buffers.get(name) is None]
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
        check_columns(own, prefix)

    def _check_codebook(self, incoming: torch.Tensor | None, prefix: str) -> None:
        """The levels of a grid that fixes them are those of the scheme."""
        if incoming is None or incoming.is_meta or self._scheme.grid == "kmeans":
            return
        levels: Any = pack_matrix(torch.zeros(1, 1), self._scheme).codebook
        given = incoming.detach().float().to(levels.device)
        if not torch.allclose(given, levels, rtol=1 / 64, atol=0.0):  # bfloat16 keeps 8 bits
            raise ValueError(
                f"{prefix}codebook has other levels than scheme {self._scheme}: the checkpoint is "
                "of another scheme; build the layer with that one"
            )
