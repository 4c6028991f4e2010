"""llama.cpp's ggml, from the shared libraries of its Python package: a matmul with q8_0 weights.

Only functions that take and return plain pointers and numbers are used, so no struct of ggml is
described here but the one that `ggml_init` takes.
"""

from __future__ import annotations

import ctypes
import glob
import os
from collections.abc import Callable
from functools import cache
from importlib import util

import torch

F32, Q8_0 = 0, 8  # enum ggml_type
GRAPH_BYTES = 16 << 20


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


_POINTER, _INT, _LONG, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_SIGNATURES = {
    "ggml_init": (_POINTER, [_InitParams]),
    "ggml_free": (None, [_POINTER]),
    "ggml_new_tensor_2d": (_POINTER, [_POINTER, _INT, _LONG, _LONG]),
    "ggml_mul_mat": (_POINTER, [_POINTER, _POINTER, _POINTER]),
    "ggml_new_graph": (_POINTER, [_POINTER]),
    "ggml_build_forward_expand": (None, [_POINTER, _POINTER]),
    "ggml_row_size": (_SIZE, [_INT, _LONG]),
    "ggml_quantize_chunk": (
        _SIZE,
        [_INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER],
    ),
    "ggml_backend_cpu_init": (_POINTER, []),
    "ggml_backend_cpu_set_n_threads": (None, [_POINTER, _INT]),
    "ggml_backend_alloc_ctx_tensors": (_POINTER, [_POINTER, _POINTER]),
    "ggml_backend_buffer_free": (None, [_POINTER]),
    "ggml_backend_free": (None, [_POINTER]),
    "ggml_backend_tensor_set": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_backend_tensor_get": (None, [_POINTER, _POINTER, _SIZE, _SIZE]),
    "ggml_backend_graph_compute": (_INT, [_POINTER, _POINTER]),
}


@cache
def _functions() -> dict[str, Callable]:
    """The functions, wherever among the package's libraries they are."""
    spec = util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("llama_cpp is not installed")
    folder = os.path.join(spec.submodule_search_locations[0], "lib")
    order = ("libggml-base", "libggml-cpu", "libggml")
    libraries = []
    for stem in order:
        for path in sorted(glob.glob(os.path.join(folder, f"{stem}.*"))):
            libraries.append(ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL))
    found = {}
    for name, (result, arguments) in _SIGNATURES.items():
        function = next((getattr(lib, name) for lib in libraries if hasattr(lib, name)), None)
        if function is None:
            raise ImportError(f"this llama_cpp has no {name} in {folder}")
        function.restype, function.argtypes = result, arguments
        found[name.removeprefix("ggml_")] = function
    return found


class _Call:
    """The graph of one product for a number of tokens."""

    def __init__(self, owner: GgmlLinear, tokens: int) -> None:
        ggml = owner.ggml
        self.context = ggml["init"](_InitParams(GRAPH_BYTES, None, True))
        self.x = ggml["new_tensor_2d"](self.context, F32, owner.in_features, tokens)
        self.y = ggml["mul_mat"](self.context, owner.weight, self.x)
        self.graph = ggml["new_graph"](self.context)
        ggml["build_forward_expand"](self.graph, self.y)
        self.buffer = ggml["backend_alloc_ctx_tensors"](self.context, owner.backend)


class GgmlLinear:
    """x [tokens, in] -> y [tokens, out], float32, through weights of type q8_0."""

    def __init__(self, weight: torch.Tensor, threads: int) -> None:
        self.ggml = ggml = _functions()
        self.out_features, self.in_features = weight.shape
        self.backend = ggml["backend_cpu_init"]()
        ggml["backend_cpu_set_n_threads"](self.backend, threads)
        self.context = ggml["init"](_InitParams(GRAPH_BYTES, None, True))
        self.weight = ggml["new_tensor_2d"](self.context, Q8_0, self.in_features, self.out_features)
        self.buffer = ggml["backend_alloc_ctx_tensors"](self.context, self.backend)
        codes = self._codes(weight.contiguous())
        ggml["backend_tensor_set"](self.weight, codes.data_ptr(), 0, codes.numel())
        self.calls: dict[int, _Call] = {}

    def _codes(self, weight: torch.Tensor) -> torch.Tensor:
        size = self.ggml["row_size"](Q8_0, self.in_features) * self.out_features
        codes = torch.empty(size, dtype=torch.uint8)
        self.ggml["quantize_chunk"](
            Q8_0, weight.data_ptr(), codes.data_ptr(), 0, self.out_features, self.in_features, None
        )
        return codes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product; its graph is made at the first call for a number of tokens."""
        tokens = x.shape[0]
        call = self.calls.get(tokens)
        if call is None:
            call = self.calls[tokens] = _Call(self, tokens)
        self.ggml["backend_tensor_set"](call.x, x.data_ptr(), 0, x.nbytes)
        if self.ggml["backend_graph_compute"](self.backend, call.graph) != 0:
            raise RuntimeError("ggml could not compute the product")
        y = torch.empty(tokens, self.out_features)
        self.ggml["backend_tensor_get"](call.y, y.data_ptr(), 0, y.nbytes)
        return y

    def __del__(self) -> None:
        if "calls" not in self.__dict__:
            return
        for call in self.calls.values():
            self.ggml["backend_buffer_free"](call.buffer)
            self.ggml["free"](call.context)
        self.ggml["backend_buffer_free"](self.buffer)
        self.ggml["free"](self.context)
        self.ggml["backend_free"](self.backend)


def ggml_linear(weight: torch.Tensor, threads: int) -> GgmlLinear:
    """The map of a float32 weight.

    Raises:
        ImportError: if the package or one of the functions is missing.
    """
    return GgmlLinear(weight, threads)
