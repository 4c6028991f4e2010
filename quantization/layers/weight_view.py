"""The weight of a quantized layer, seen as a tensor: read like one, computed late, never written.

Many models ask a weight for its dtype or device in each call. That costs next to nothing here;
numbers are made when an operator, NumPy or a copy asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_any, tree_map_only

__all__ = ["READ_ONLY", "WeightView", "can_be_viewed"]

READ_ONLY = (
    "the weight of a quantized layer is computed from its codes and cannot be assigned or written "
    "in place; call layer.quantize(weights) to give it other numbers, or make the model float by "
    "dequantize_model(model)"
)


def can_be_viewed(tensor: torch.Tensor) -> bool:
    """Whether a weight made of that tensor may be a view: not where torch records what is computed.

    Compilers, tracers, fake tensors and transforms know plain tensors, and cost nothing there.

    Example:
        >>> can_be_viewed(torch.ones(2))
        True
    """
    return not (
        torch.compiler.is_compiling()
        or type(tensor) is not torch.Tensor
        or is_functorch_wrapped_tensor(tensor)
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()  # fake tensors, counters of operations
    )


class WeightView(torch.Tensor):
    """A tensor whose numbers are computed when they are first asked for, and can only be read.

    What operators return, copies, pickles and Parameters of it are ordinary tensors; a row or a
    transpose of it, which would share its memory, can only be read either.

    Args:
        compute: gives the numbers: a tensor of that shape, dtype and device.
        shape, dtype, device, strides, storage_offset: as of a tensor; no strides: it is contiguous.

    Raises:
        RuntimeError: at any write.

    Example:
        >>> view = WeightView(lambda: torch.ones(2, 3), (2, 3), torch.float32, "cpu")
        >>> view.shape, (view + 1).sum(), type(view + 1).__name__
        (torch.Size([2, 3]), tensor(12.), 'Tensor')
        >>> view.data[0] = 7  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        RuntimeError: the weight of a quantized layer is computed from its codes and cannot be ...
    """

    _numbers: Callable[[], torch.Tensor]
    _device: torch.device

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(  # noqa: D102
        cls,
        compute: Callable[[], torch.Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        strides: Sequence[int] | None = None,
        storage_offset: int | None = None,
    ) -> WeightView:
        # to torch it is a tensor on meta that names another device: one of the device's own kind
        # could be put into others (other.data = view), which have no numbers then
        kind = {"dtype": dtype, "device": "meta", "dispatch_device": True}
        make: Any = torch.Tensor._make_wrapper_subclass
        view: WeightView = make(cls, shape, strides, storage_offset, **kind)
        view._numbers, view._device = cache(compute), torch.device(device)
        return view

    def __init__(self, *_: Any) -> None: ...

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the numbers come to be."""
        return self._device

    def plain(self) -> torch.Tensor:
        """The numbers as an ordinary tensor, which is shared with all who ask: not to be written.

        Example:
            >>> WeightView(lambda: torch.ones(2), (2,), torch.float32, "cpu").plain()
            tensor([1., 1.])
        """
        with torch.inference_mode(False), torch.no_grad():
            return self._numbers()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0]._device
        kwargs = kwargs or {}
        _check_reads_only(func._schema, args, kwargs)
        if func is torch.ops.aten.detach.default:
            return args[0]._formed_as(args[0], args[0]._numbers)
        plain_args, plain_kwargs = tree_map_only(cls, cls.plain, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        if isinstance(args[0], cls) and any(value.alias_info for value in func._schema.returns):
            return tree_map_only(torch.Tensor, lambda t: cls._formed_as(t, lambda: t), result)
        return result

    @classmethod
    def _formed_as(cls, tensor: torch.Tensor, numbers: Callable[[], torch.Tensor]) -> WeightView:
        form = (tensor.shape, tensor.dtype, tensor.device, tensor.stride(), tensor.storage_offset())
        return cls(numbers, *form)

    # ---- what torch writes without an operator -------------------------------------------------

    @property
    def data(self) -> torch.Tensor:
        """Itself, without gradient; assigning to it is refused."""
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        raise RuntimeError(READ_ONLY)

    def _refuse(self, *_: Any) -> NoReturn:
        raise RuntimeError(READ_ONLY)

    __setitem__ = apply_ = map_ = map2_ = _refuse  # type: ignore[assignment]

    def _become(self, kind: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Be an ordinary tensor of that kind from now on, with a copy of the numbers."""
        torch.utils.swap_tensors(self, kind(self.plain().clone()))

    @property
    def _is_param(self) -> bool:
        """What nn.Parameter sets on the tensor that it has made of a view: it is to be trained."""
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        requires_grad = self.requires_grad
        self._become(lambda numbers: nn.Parameter(numbers, requires_grad))

    @property
    def _is_buffer(self) -> bool:
        """What nn.Buffer sets."""
        return False

    @_is_buffer.setter
    def _is_buffer(self, value: bool) -> None:
        self._become(nn.Buffer)

    # ---- what torch reads without an operator --------------------------------------------------

    def numpy(self, *, force: bool = False) -> np.ndarray[Any, Any]:
        """The numbers as an array that cannot be written."""
        array = self.plain().numpy(force=force).view()
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """The same for NumPy's functions; a copy of it can be written."""
        return np.array(self.numpy(), dtype, copy=copy)

    def __copy__(self) -> torch.Tensor:
        return self.plain().clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copy = self.plain().clone().requires_grad_(self.requires_grad)
        return memo.setdefault(id(self), copy)  # type: ignore[no-any-return]


def _of_numbers(name: str) -> Callable[..., Any]:
    """That method of the numbers, which needs their memory."""

    def method(self: WeightView, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.plain(), name)(*args, **kwargs)

    return method


for _name in (
    *("__reduce_ex__", "__repr__", "__format__", "__dlpack__", "as_subclass", "tolist"),
    *("data_ptr", "storage", "untyped_storage"),
):
    setattr(WeightView, _name, _of_numbers(_name))


def _check_reads_only(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError if an operator is to write a view, alone or in a list."""
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written = args[place] if place < len(args) else kwargs.get(argument.name)
            if tree_any(lambda value: isinstance(value, WeightView), written):
                raise RuntimeError(READ_ONLY)
