"""The torch operators, bare: registered, with shapes for fake tensors and batching rules.

Importing this module imports torch. The operators of :mod:`quantization.ops.operators` are
registered from C through torch's stable shim, or, with a torch that lacks it, in Python over the
NumPy binding; the environment variable ``QUANTIZATION_TORCH_OPS`` forces one of them (``c``, or an
error; ``python``). Those are kernels for the CPU; other devices have
:mod:`quantization.ops.torch_devices`. Programs call the functions of
:mod:`quantization.ops.torch_ops`: a bare operator has no gradient.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from quantization import _kernels, forks
from quantization.ops import torch_devices
from quantization.ops.exporters import onnx_nodes
from quantization.ops.operators import OPERATORS, Call, check_call

# ---- kernels in Python, for a torch without the stable shim -----------------------------------

_NUMBERS = {
    torch.float32: _kernels.FLOAT32,
    torch.bfloat16: _kernels.BFLOAT16,
    torch.float16: _kernels.FLOAT16,
    torch.float64: _kernels.FLOAT64,
    torch.uint8: _kernels.UINT8,
    torch.int8: _kernels.INT8,
}


def _array(tensor: torch.Tensor | None) -> Any:
    """The numbers of a CPU tensor as an ndarray, 16-bit floats as their bits; None for None."""
    if tensor is None:
        return None
    tensor = tensor.detach().contiguous()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.view(torch.int16)
    return tensor.numpy()


def multiply(call: Call) -> torch.Tensor:
    """What the operator gives, by the NumPy binding of the C kernels.

    Raises:
        RuntimeError: if something does not fit.
    """
    check_call(call)
    result = torch.empty(call.result_shape, dtype=call.dtype)
    sizes = [call.rows.shape[:-1].numel(), call.out_features, call.in_features]
    tensors: tuple[torch.Tensor | None, ...] = (call.weights, call.scales)
    typed: tuple[torch.Tensor | None, ...] = (result, call.rows, call.scales)
    if call.group is not None:
        tensors += (call.scale_steps, call.zero_points, call.codebook)
        typed += (call.scale_steps, call.zero_points, call.codebook)
        sizes += [call.bits, call.group, 1 if call.codebook is None else call.codebook.shape[0]]
    if not call.is_backward:
        tensors, typed = (*tensors, call.bias), (*typed, call.bias)
    name = ("linear" if call.group is None else "linear_packed") + "_backward" * call.is_backward
    getattr(_kernels, name)(
        *(_array(tensor) for tensor in (result, call.rows, *tensors)),
        *sizes,
        *(_NUMBERS[torch.float32 if t is None else t.dtype] for t in typed),
    )
    return result


# ---- registration ----------------------------------------------------------------------------

_library = torch.library.Library("quantization", "FRAGMENT")  # what it registered dies with it


def _register() -> str:
    """Register the operators; returns which kernels they have, ``"c"`` or ``"python"``.

    Raises:
        RuntimeError: if QUANTIZATION_TORCH_OPS asks for what cannot be had.
    """
    wanted = os.environ.get("QUANTIZATION_TORCH_OPS", "")
    if wanted not in ("", "c", "python"):
        raise RuntimeError(f"QUANTIZATION_TORCH_OPS is {wanted!r}; allowed are 'c' and 'python'")
    if wanted != "python":
        for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
            if _kernels.register_torch(os.path.join(torch.__path__[0], "lib", name)):
                return "c"
        if wanted == "c":
            raise RuntimeError(
                f"torch {torch.__version__} has no stable C shim (2.10 and later have); "
                "unset QUANTIZATION_TORCH_OPS"
            )
    for operator in OPERATORS:
        _library.define(operator.schema)
        _library.impl(operator.name, operator.kernel(multiply), "CPU")
    return "python"


if forks.is_child() and _kernels.get_num_threads() == 1:
    _kernels.set_num_threads(1)  # those of torch, which are now to be had, stayed in the parent

#: Which kernels the operators have: ``"c"`` or ``"python"``.
KERNELS = _register()

linear: Callable[..., torch.Tensor] = torch.ops.quantization.linear.default
linear_bias: Callable[..., torch.Tensor] = torch.ops.quantization.linear_bias.default
linear_backward: Callable[..., torch.Tensor] = torch.ops.quantization.linear_backward.default
packed: Callable[..., torch.Tensor] = torch.ops.quantization.packed.default
packed_backward: Callable[..., torch.Tensor] = torch.ops.quantization.packed_backward.default


def raise_heard(error: RuntimeError) -> None:
    """Raise what a signal's handler raised in the middle of an operator, if that is its error.

    A KeyboardInterrupt, say: an operator of torch can report errors of C++ alone.
    """
    if "interrupted by a signal" in str(error):
        _kernels.raise_heard()


def _without_numbers(call: Call) -> torch.Tensor:
    """What the operator gives, of fake and meta tensors: a shape and a dtype."""
    check_call(call)
    return call.rows.new_empty(call.result_shape, dtype=call.dtype)


def _batched(operator: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, int]]:
    """Under vmap a batch of rows is more rows; a batch of weights is one call for each."""

    def run(info: Any, in_dims: tuple[Any, ...], rows: Any, *rest: Any) -> tuple[torch.Tensor, int]:
        if all(dim is None for dim in in_dims[1:]):
            return operator(rows.movedim(in_dims[0], 0), *rest), 0
        results = []
        for i in range(info.batch_size):
            pairs = zip((rows, *rest), in_dims, strict=True)
            results.append(operator(*(a if d is None else a.select(d, i) for a, d in pairs)))
        return torch.stack(results), 0

    return run


def _by_part(operator: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A nested tensor, which nn.TransformerEncoder makes of a mask, is a call for each part."""

    def run(rows: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.nested.as_nested_tensor([operator(part, *rest) for part in rows.unbind()])

    return run


for _row in OPERATORS:
    _name, _operator = _row.name, getattr(torch.ops.quantization, _row.name).default
    torch.library.register_fake(_operator, _row.kernel(_without_numbers), lib=_library)
    torch.library.register_vmap(_operator, _batched(_operator), lib=_library)
    # the kernels above are for the CPU; this is for whatever else there is
    _library.impl(_name, _row.kernel(torch_devices.multiply), "CompositeExplicitAutograd")
    if not _row.is_backward:
        for _key in ("NestedTensorCPU", "NestedTensorCUDA"):
            _library.impl(_name, _by_part(_operator), _key)
        _library.impl(_name, torch.library.fallthrough_kernel, "AutogradNestedTensor")

onnx_nodes.register()
