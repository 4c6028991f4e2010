"""ONNX: the operator MatMulNBits of ONNX Runtime (``com.microsoft``, version 1), written.

``B`` uint8 ``[N, blocks, block_size * bits / 8]``
    Codes along the rows, the first in the lowest bits; the last block of a row is filled with 0.
``scales`` float32 ``[N, blocks]``
``zero_points`` uint8 ``[N, ceil(blocks * bits / 8)]``, packed in the same way
    Or, at 2 and 4 bits, float32 ``[N, blocks]``, not packed; without them ``2**(bits - 1)``. ONNX
    Runtime (1.32) refuses floats at 8 bits when it opens the model.

``w[n, k] = (code - zero) * scale``, and ``y = x w^T + bias``.

Source: ONNX Runtime, ``docs/ContribOperators.md``, MatMulNBits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quantization.checkpoint.disk.files import new_file, new_folder
from quantization.checkpoint.disk.stored_tensor import key_of
from quantization.checkpoint.stored_model import StoredLayer, StoredModel, stored_model
from quantization.formats.errors import FormatError
from quantization.formats.integers import Integers, integers_of, why_not, why_not_columns, width_of
from quantization.layers.quantized_linear import QuantizedLinear
from quantization.numerics.parameters import Mode
from quantization.numerics.weight_packing import pack_weights
from quantization.ops import native
from quantization.ops.extras import install_command
from quantization.schemes.packed_weights import PackedWeights
from quantization.schemes.scheme import Scheme

__all__ = ["MatMulNBits", "export_layer_onnx", "matmul_nbits", "write_onnx"]

WIDTHS = (2, 4, 8)
LEAST_BLOCK, LARGEST_BLOCK = 16, 256  # powers of two
ROW_BLOCK = 128  # for a row with one scale, if it is that long
EXACT_FLOATS = 1  # accuracy_level: activations stay float32
_OPSET, _IR_VERSION = 21, 10


@dataclass(frozen=True, eq=False)
class MatMulNBits:
    """Attributes and constant inputs of the operator; the head of the module says what each holds.

    Attributes:
        K: ``in_features``.
        N: ``out_features``.
        bits: 2, 4 or 8.
        block_size: a power of two, 16..256.
        B: uint8 ``[N, blocks, block_size * bits / 8]``.
        scales: float32 ``[N, blocks]``.
        zero_points: uint8 or float32, or None.
    """

    K: int
    N: int
    bits: int
    block_size: int
    B: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None

    @property
    def attributes(self) -> dict[str, int]:
        """Of the node, with accuracy level 1: activations stay float32."""
        sizes = {"K": self.K, "N": self.N, "bits": self.bits, "block_size": self.block_size}
        return sizes | {"accuracy_level": EXACT_FLOATS}

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """The constant inputs by the operator's names, in its order."""
        named = {"B": self.B, "scales": self.scales, "zero_points": self.zero_points}
        return {name: array for name, array in named.items() if array is not None}


def matmul_nbits(packed: PackedWeights) -> MatMulNBits:
    """A packed matrix as the operator takes it, of the same numbers to the last bit.

    Codes of 3 bits become codes of 4, those of 5..7 bits codes of 8, binary and ternary ones codes
    of 2. A group is cut into the largest blocks that fit it, and scales are repeated.

    Args:
        packed: of torch tensors; integers, with whole zero points or, up to 4 bits, float ones,
            binary or ternary. The group must be a multiple of 16, or a whole row.

    Raises:
        FormatError: if the operator cannot hold it; the message says why.

    Example:
        >>> from quantization import pack_matrix
        >>> node = matmul_nbits(pack_matrix(torch.randn(8, 100), "w3g32a"))
        >>> node.attributes["bits"], node.attributes["block_size"], node.B.shape
        (4, 32, (8, 4, 16))
    """
    scheme, (rows, cols) = packed.scheme, packed.shape
    reason = _why_not(scheme, cols)
    if reason is not None:
        raise FormatError(f"MatMulNBits cannot hold the scheme {scheme}: {reason}")
    numbers = integers_of(packed, width_of(scheme, WIDTHS))
    scales = native.to_array(numbers.scales.double())
    if not np.array_equal(scales.astype("float32").astype("float64"), scales, equal_nan=True):
        raise FormatError("MatMulNBits has float32 scales, which would round these of float64")
    block = _block(scheme, cols)
    blocks = -(-cols // block)
    places = np.arange(blocks) * block // scheme.group(cols)
    zeros = None if numbers.zero_points is None else numbers.zero_points[:, places]
    return MatMulNBits(
        cols,
        rows,
        numbers.bits,
        block,
        _blob(numbers, block, blocks),
        scales.astype("float32")[:, places],
        None if zeros is None else _stored_zeros(zeros, numbers.bits),
    )


def _why_not(scheme: Scheme, cols: int) -> str | None:
    has_float_zeros = scheme.mode is Mode.Asymmetric and not scheme.has_integer_zeros
    reason = why_not_columns(scheme) if has_float_zeros else why_not(scheme)
    if has_float_zeros and width_of(scheme, WIDTHS) == 8:
        return (
            f"its codes of {scheme.bits} bits become codes of 8, with which ONNX Runtime takes no "
            "float zero points; quantize with whole ones (zero_point='integer', a name that ends "
            "in 'a', not 'af'), or in 4 bits or fewer"
        )
    if reason is None and _block(scheme, cols) < LEAST_BLOCK:
        return (
            f"its groups of {scheme.group(cols)} cannot be cut into blocks of {LEAST_BLOCK}, 32 "
            "or more; use groups of such a size"
        )
    return reason


def _block(scheme: Scheme, cols: int) -> int:
    """The largest block that lies within a group (less for short rows with one scale)."""
    if scheme.groups(cols) > 1:
        group = scheme.group(cols)
        return min(group & -group, LARGEST_BLOCK)
    block = LEAST_BLOCK
    while block < min(cols, ROW_BLOCK):
        block *= 2
    return block


def _blob(numbers: Integers, block: int, blocks: int) -> np.ndarray:
    data = native.to_array(pack_weights(numbers.codes, numbers.bits, layout="dense", dim=1))
    size = block * numbers.bits // 8
    padded = np.zeros((len(data), blocks * size), "uint8")
    padded[:, : data.shape[1]] = data
    return padded.reshape(len(data), blocks, size)


def _stored_zeros(zeros: torch.Tensor, bits: int) -> np.ndarray:
    if zeros.is_floating_point():
        return native.to_array(zeros.float())
    return native.to_array(pack_weights(zeros, bits, layout="dense", dim=1))


# ---- files -----------------------------------------------------------------------------------


def export_layer_onnx(
    layer: QuantizedLinear, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write one linear layer as an ONNX model of one node, which ONNX Runtime runs.

    The model maps ``x`` float32 ``[tokens, in_features]`` to ``y`` ``[tokens, out_features]``.

    Args:
        layer: a :class:`quantization.PackedLinearLayer` or :class:`quantization.QWQALinearLayer`.
        path: of the file.
        overwrite: replace a file that is there.

    Raises:
        TypeError: if ``layer`` is none.
        FormatError: if the operator cannot hold it.
        FileExistsError: if a file is there, without ``overwrite``.
        ModuleNotFoundError: if the package onnx is not installed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from quantization import PackedLinearLayer
        >>> with tempfile.TemporaryDirectory() as place:
        ...     export_layer_onnx(PackedLinearLayer(64, 32, scheme="w4g32a"), f"{place}/a.onnx")
        ...     Path(f"{place}/a.onnx").stat().st_size > 1024
        True
    """
    if not isinstance(layer, QuantizedLinear):
        raise TypeError(
            f"layer is a {type(layer).__name__}; expected a PackedLinearLayer or QWQALinearLayer"
        )
    stored = stored_model(layer)
    bias = stored.tensors.get("bias")
    proto = _model("linear", stored.layers[""], None if bias is None else bias.load())
    with new_file(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(proto)


def write_onnx(
    stored: StoredModel, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write the quantized layers of a model as ONNX models of one node each: all, or none.

    ``<dotted name>.onnx`` is what :func:`export_layer_onnx` writes of the layer, with constants
    named ``<dotted name>.B``, ``.scales``, ``.zero_points`` and ``.bias``. They take the places of
    the MatMul nodes in a graph that was exported from the float model; its float tensors stay there
    and are not written here.

    Args:
        stored: a model with at least one quantized layer.
        folder: where to write; made with its parents.
        overwrite: replace a folder that is there.

    Raises:
        FileExistsError: if the folder is there and not empty, without ``overwrite``.
        FormatError: if there is no layer, or the operator cannot hold one, such as an embedding;
            the message names it. Nothing has been written then.
        ModuleNotFoundError: if the package onnx is not installed.

    Example:
        >>> import tempfile
        >>> from quantization import quantize_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
        >>> _ = quantize_model(model, "w4g32")
        >>> with tempfile.TemporaryDirectory() as place:
        ...     write_onnx(stored_model(model), f"{place}/layers")
        ...     os.listdir(f"{place}/layers")
        ['0.onnx']
    """
    if not stored.layers:
        raise FormatError("the model has no quantized layers, which alone become ONNX nodes")
    for name, layer in stored.layers.items():
        reason = _why_not(layer.scheme, layer.shape[1])
        if layer.kind == "embedding":
            reason = "it is an embedding, and the operator multiplies"
        if "/" in name or "\\" in name:
            reason = "its name is none of a file"
        if reason is not None:
            raise FormatError(
                f"MatMulNBits cannot hold {name or 'the model'} ({layer.scheme}): {reason}"
            )
    _onnx()
    with new_folder(folder, overwrite=overwrite) as made:
        for name, layer in stored.layers.items():
            bias = stored.tensors.get(key_of(name, "bias"))
            proto = _model(name or "linear", layer, None if bias is None else bias.load())
            (made / f"{name or 'linear'}.onnx").write_bytes(proto)


def _model(name: str, layer: StoredLayer, bias: torch.Tensor | None) -> bytes:
    """The bytes of a model of one node."""
    onnx = _onnx()
    node = matmul_nbits(layer.load())
    constants: Mapping[str, Any] = node.inputs
    if bias is not None:
        constants = {**constants, "bias": native.to_array(bias.float())}
    # A, B, scales, zero_points, g_idx, bias; what is left out has an empty name
    wanted = ("B", "scales", "zero_points", "g_idx", "bias")
    inputs = ["x", *(f"{name}.{part}" if part in constants else "" for part in wanted)]
    while not inputs[-1]:
        inputs.pop()
    made = onnx.helper.make_node(
        "MatMulNBits", inputs, ["y"], name, domain="com.microsoft", **node.attributes
    )
    float_tensor = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [made],
        name,
        [onnx.helper.make_tensor_value_info("x", float_tensor, ["tokens", node.K])],
        [onnx.helper.make_tensor_value_info("y", float_tensor, ["tokens", node.N])],
        [
            onnx.numpy_helper.from_array(array, f"{name}.{part}")
            for part, array in constants.items()
        ],
    )
    sets = [onnx.helper.make_opsetid("", _OPSET), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(
        graph, opset_imports=sets, ir_version=_IR_VERSION, producer_name="quantization"
    )
    return model.SerializeToString()


def _onnx() -> Any:
    try:
        import onnx
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"writing ONNX files needs the package onnx: {install_command('onnx')}"
        ) from None
    return onnx
