"""The embedding of packed rows: gathered packed, dequantized by row, never the whole table."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from quantization.layers.float_layers import embedding_table
from quantization.layers.packed_module import DEFAULT_SCHEME, PackedModule
from quantization.layers.quantized_module import check_packed, check_sizes
from quantization.ops import packed_rows
from quantization.ops.dtypes import index_of, name_of, source_of
from quantization.schemes.conversion import repack
from quantization.schemes.packed_weights import OPERANDS, PackedWeights
from quantization.schemes.scheme import Scheme, scheme_of

__all__ = ["PackedEmbedding"]


class PackedEmbedding(PackedModule, nn.Embedding):
    """An embedding that keeps its table packed, with the buffers of a packed linear layer.

    A subclass of nn.Embedding, so that libraries see one, but with buffers only and no Parameters.
    A call gathers the packed rows of its tokens and dequantizes those; the table is never made.
    Nothing of it can be trained, so ``sparse`` and ``scale_grad_by_freq`` have no meaning.

    A fresh one draws the numbers of nn.Embedding and quantizes them; on the meta device it has
    shapes only. ``.to(dtype)`` casts floats, never codes.

    Args:
        num_embeddings: rows of the table; may be 0.
        embedding_dim: length of a row; may be 0.
        padding_idx: a row that a fresh table fills with zeros; kept for libraries that read it.
        max_norm: must be None: rows that calls would shrink cannot be kept packed.
        scheme: a :class:`quantization.Scheme`, or its short name.
        dtype: of what a call returns: float32, bfloat16, float16 or float64.
        device: of the buffers; None: torch's current default.

    Raises:
        TypeError: for another dtype, a size that is no integer, or no scheme.
        ValueError: for a negative size, a padding row that is none of the table's, or a max_norm.

    Example:
        >>> table = PackedEmbedding(100, 64, scheme="w8")
        >>> table(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 64])
        >>> table
        PackedEmbedding(100, 64, dtype=float32, weights=w8, 6,800 bytes)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: None = None,
        scheme: Scheme | str = DEFAULT_SCHEME,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | int | None = None,
    ) -> None:
        source_of(dtype, "a quantized embedding")
        check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        if max_norm is not None:
            raise ValueError(
                f"max_norm is {max_norm}: rows that calls would shrink cannot be kept packed; "
                "renormalize the table once, then quantize it"
            )
        if scheme_of(scheme).input_order or scheme_of(scheme).input_scale:
            raise ValueError(
                f"scheme {scheme} gives columns an order or multipliers, which a linear layer "
                "applies to its input; take it without +order, +cols for an embedding"
            )
        nn.Module.__init__(self)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = _row_of(padding_idx, num_embeddings)
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._register_packed(scheme, dtype, device)
        self.reset_parameters()

    @classmethod
    def from_float(
        cls,
        embedding: nn.Embedding,
        scheme: Scheme | str = DEFAULT_SCHEME,
        *,
        nonfinite: str = "raise",
        name: str = "weight",
        **fitting: Any,
    ) -> Self:
        """The packed embedding of a float one, which is left as it is.

        Args:
            embedding: an nn.Embedding, of float32, bfloat16, float16 or float64, on any device
                including meta.
            scheme: a :class:`quantization.Scheme`, or its short name.
            nonfinite: as for :meth:`quantize`.
            name: what error messages call the table.
            fitting: ``importance``, ``method`` and ``statistics``, as for :meth:`quantize`.

        Raises:
            TypeError: if ``embedding`` cannot be converted; the message says why.
            ValueError: for a NaN or infinity in the table, with its index.

        Example:
            >>> table = nn.Embedding(100, 64)
            >>> packed, rows = PackedEmbedding.from_float(table, "w8"), torch.tensor([7, 7, 99])
            >>> bool((packed(rows) - table(rows)).abs().max() < 0.05)
            True
        """
        weight = embedding_table(embedding)
        (rows, cols), dtype = weight.shape, weight.dtype
        made = cls(rows, cols, embedding.padding_idx, scheme=scheme, dtype=dtype, device="meta")
        made.quantize(weight, nonfinite=nonfinite, name=name, **fitting)
        return made.train(embedding.training)

    @classmethod
    def from_packed(cls, packed: PackedWeights, padding_idx: int | None = None) -> Self:
        """The embedding of a table that is packed already; it holds its tensors, not copies.

        Example:
            >>> from quantization import pack_matrix
            >>> PackedEmbedding.from_packed(pack_matrix(torch.eye(4), "w2a"))(torch.tensor([2]))
            tensor([[0., 0., 1., 0.]])
        """
        check_packed(packed)
        (rows, cols), dtype = packed.shape, getattr(torch, packed.dtype)
        made = cls(rows, cols, padding_idx, scheme=packed.scheme, dtype=dtype, device="meta")
        made._set_buffers(made._parts_of(packed), packed.shape)
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The rows of those numbers, dequantized in float32 and rounded once to the layer's dtype.

        Args:
            input: integers 0..num_embeddings - 1, of any shape.

        Returns:
            ``[*input.shape, embedding_dim]``.

        Raises:
            IndexError: for a number that is no row of the table.
        """
        rows, buffers = input.reshape(-1), self._buffers
        parts: list[Any] = [buffers[name] for name in OPERANDS]
        for i, tensor in enumerate(parts):
            if tensor is not None and tensor.shape[0] == self.num_embeddings:
                parts[i] = tensor.index_select(0, rows)  # all but one codebook for all rows
        codes, scales, steps, zeros, book = parts
        decoded: torch.Tensor = packed_rows.decode_rows(
            codes, scales, steps, zeros, book, self._bits, self._group, self.embedding_dim
        )
        shape = input.shape + (self.embedding_dim,)  # noqa: RUF005 (fx cannot unpack a shape)
        return packed_rows.round_once(decoded, self.dtype).reshape(shape)

    def to_scheme(self, scheme: Scheme | str) -> PackedEmbedding:
        """An embedding of another scheme, as :meth:`PackedLinearLayer.to_scheme` makes a layer.

        Example:
            >>> table = PackedEmbedding(10, 64, scheme="w4")
            >>> bool((table.to_scheme("w8").weight == table.weight).all())
            True
        """
        new = PackedEmbedding.from_packed(
            repack(self.packed(), scheme_of(scheme)), self.padding_idx
        )
        return new.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, dtype, scheme and bytes, for printing."""
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, {padding}dtype={name_of(self.dtype)}, "
            f"weights={self.scheme}, {self.nbytes:,} bytes"
        )

    def _float_module(self, device: Any, dtype: torch.dtype) -> nn.Embedding:
        sizes = (self.num_embeddings, self.embedding_dim)
        return nn.Embedding(*sizes, self.padding_idx, device=device, dtype=dtype)

    def _weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def _set_buffers(self, buffers: dict[str, torch.Tensor | None], shape: tuple[int, ...]) -> None:
        super()._set_buffers(buffers, shape)
        self.num_embeddings, self.embedding_dim = shape


def _row_of(padding_idx: Any, rows: int) -> int | None:
    """The padding row, counted from the start."""
    if padding_idx is None:
        return None
    index = index_of(padding_idx, "padding_idx")
    if not -rows <= index < rows:
        raise ValueError(f"padding_idx is {index}; the table has {rows} rows")
    return index % rows
