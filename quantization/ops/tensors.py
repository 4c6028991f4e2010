"""Torch tensors and ndarrays as one: which of them a value is, and each as the other.

Types that NumPy lacks travel as their bits (bfloat16 as int16, float8 as uint8). Torch is never
imported here: a torch tensor can only come from a program that has imported it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from quantization.forks import alone
from quantization.ops.dtypes import DType, name_of

if TYPE_CHECKING:
    import torch
    from typing_extensions import TypeIs

#: An ndarray of any shape and type.
Array: TypeAlias = np.ndarray[Any, Any]
if TYPE_CHECKING:
    #: A torch.Tensor or an ndarray.
    Tensor: TypeAlias = torch.Tensor | Array
    #: What a function is given as TensorT, it gives back as the same kind of tensor.
    TensorT = TypeVar("TensorT", torch.Tensor, Array, Tensor)
    #: The same where all arguments have to be of one kind.
    SameKindT = TypeVar("SameKindT", torch.Tensor, Array)
else:  # torch is not imported to say so
    Tensor = TensorT = SameKindT = Any

#: The NumPy types that hold the bits of those that NumPy lacks.
BITS = {"bfloat16": "int16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}


def is_torch(value: object) -> TypeIs[torch.Tensor]:
    """Whether ``value`` is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_tensor(value: object) -> TypeIs[Tensor]:
    """Whether ``value`` is a torch tensor or a plain ndarray: the mask of another would be lost."""
    is_array = isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray)
    return is_torch(value) or is_array


def is_meta(value: object) -> bool:
    """Whether ``value`` is a torch tensor with a shape but no numbers."""
    return is_torch(value) and value.is_meta


def check_tensor(value: object, what: str) -> None:
    """Raise TypeError unless ``value`` is a torch tensor with one shape or a plain ndarray."""
    if not is_tensor(value):
        raise TypeError(
            f"{what} must be a torch.Tensor or numpy.ndarray, not {type(value).__name__}"
        )
    if is_torch(value) and value.is_nested:
        raise TypeError(f"{what} is a nested tensor: pass its parts, from unbind(), one by one")


def to_array(tensor: Tensor, what: str = "tensor") -> Array:
    """The tensor's numbers as a C-contiguous ndarray in native byte order, copied only if need be.

    Raises:
        TypeError: if ``tensor`` is neither a torch tensor nor an ndarray, or is a masked array.
        ValueError: if it has no numbers (a meta tensor) or is not dense.
    """
    if is_torch(tensor):
        return _torch_to_array(tensor, what)
    if not is_tensor(tensor):
        raise TypeError(
            f"{what} must be a torch.Tensor or numpy.ndarray, not {type(tensor).__name__}"
        )
    array = np.asarray(tensor)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    bits = BITS.get(array.dtype.name)
    array = np.array(array, order="C", copy=None)
    return array if bits is None else array.view(bits)


def _torch_to_array(tensor: torch.Tensor, what: str) -> Array:
    if tensor.is_meta:
        raise ValueError(f"{what} is on the meta device: it has a shape but no numbers")
    if tensor.layout is not sys.modules["torch"].strided:
        raise ValueError(f"{what} has layout {tensor.layout}; only dense (strided) tensors will do")
    with alone():
        dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    bits = BITS.get(name_of(dense.dtype))
    return (dense if bits is None else dense.view(_torch_dtype(bits))).numpy()


def as_tensor_like(array: Array, dtype: DType | str, like: TensorT) -> TensorT:
    """``array`` (bits, where NumPy lacks the type) as a tensor of the kind and device of ``like``.

    Raises:
        TypeError: for an ndarray of a type that NumPy lacks, unless ml_dtypes is installed.
    """
    name = dtype if isinstance(dtype, str) else dtype.storage
    if is_torch(like):
        tensor: torch.Tensor = sys.modules["torch"].from_numpy(array)
        tensor = tensor.view(_torch_dtype(name)) if name in BITS else tensor
        return tensor.to(like.device)
    return array.view(_numpy_dtype(name)) if name in BITS else array


def filled(shape: tuple[int, ...], value: int, dtype: str, like: TensorT) -> TensorT:
    """A tensor of one value, of the kind and device (also meta) of ``like``."""
    if value == 0 and not is_meta(like):  # memory that is not touched before it is read
        return as_tensor_like(np.zeros(shape, BITS.get(dtype, dtype)), dtype, like)
    if is_torch(like):
        return like.new_full(shape, value, dtype=_torch_dtype(dtype))
    return np.full(shape, value, _numpy_dtype(dtype))


def cast(tensor: TensorT, dtype: str) -> TensorT:
    """The same numbers as type ``dtype``, rounded to nearest even."""
    if is_torch(tensor):
        with alone():
            return tensor.to(_torch_dtype(dtype))
    return tensor.astype(_numpy_dtype(dtype), copy=False)


def _torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(sys.modules["torch"], name)
    return dtype


def _numpy_dtype(name: str) -> Any:
    if name not in BITS:
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(
            f"NumPy has no {name}: install ml_dtypes, or pass a torch tensor instead"
        ) from None
    return getattr(ml_dtypes, name)
