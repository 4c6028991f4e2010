"""Who else maps float activations through int8 weights on a CPU: one small adapter each.

A peer says which package it needs, which dtypes it takes and which shapes it does not survive. One
that is absent or fails is listed with the reason. `W8A8` marks those that quantize activations too:
they do less exact arithmetic, and are shown for scale, not for comparison.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata

import torch
from torch import nn

from benchmarks.harness import Failure, first_line
from benchmarks.peer_ggml import ggml_linear

Map = Callable[[torch.Tensor], torch.Tensor]
ALL = ("float32", "bfloat16", "float16")
BLOCK = 128  # weights that share a scale in ONNX Runtime's kernel


@dataclass(frozen=True)
class Problem:
    """A weight to be applied, the same numbers for everyone.

    Attributes:
        weight: float32, [out_features, in_features].
        dtype: of the activations, a torch name.
    """

    weight: torch.Tensor
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return getattr(torch, self.dtype)

    def linear(self) -> nn.Linear:
        """A float layer of the dtype with this weight, without bias."""
        out_features, in_features = self.weight.shape
        layer = nn.Linear(in_features, out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.weight.to(self.torch_dtype, copy=True))
        return layer.requires_grad_(False).eval()

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 codes and one scale a row of the dtype, by the plain torch expression."""
        scales = (self.weight.abs().amax(1) / 127).to(self.torch_dtype)
        codes = (self.weight / scales.float()[:, None]).round_().clamp_(-127, 127)
        return codes.to(torch.int8), scales


# ---- the adapters ----------------------------------------------------------------------------


def _nn_linear(problem: Problem, threads: int) -> Map:
    return problem.linear()


def _int8pack(problem: Problem, threads: int) -> Map:
    codes, scales = problem.rows()
    return lambda x: torch._weight_int8pack_mm(x, codes, scales)


def _cast(problem: Problem, threads: int) -> Map:
    codes, scales = problem.rows()
    return lambda x: nn.functional.linear(x, codes.to(x.dtype)) * scales


def _quantize_dynamic(problem: Problem, threads: int) -> Map:
    model = nn.Sequential(problem.linear())
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def _torchao(problem: Problem, threads: int) -> Map:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(problem.linear())
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    return model


def quanto_map(problem: Problem, threads: int, weights: str = "qint8") -> Map:
    """The layer of optimum-quanto."""
    from optimum import quanto

    model = nn.Sequential(problem.linear())
    quanto.quantize(model, weights=getattr(quanto, weights))
    quanto.freeze(model)
    return model


def _bitsandbytes(problem: Problem, threads: int) -> Map:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    out_features, in_features = problem.weight.shape
    layer = Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
    layer.weight = Int8Params(problem.weight.clone(), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu").eval()


def onnxruntime_map(problem: Problem, threads: int, accuracy_level: int, bits: int = 8) -> Map:
    """The map of ONNX Runtime's MatMulNBits; level 1 multiplies floats, level 4 int8."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        _matmul_nbits(problem.weight, accuracy_level, bits),
        options,
        providers=["CPUExecutionProvider"],
    )
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def _matmul_nbits(weight: torch.Tensor, accuracy_level: int, bits: int) -> bytes:
    """A model of one MatMulNBits node: codes around 2**(bits - 1), a scale for each block."""
    from onnx import TensorProto, helper, numpy_helper

    out_features, in_features = weight.shape
    blocks = -(-in_features // BLOCK)
    padded = nn.functional.pad(weight, (0, blocks * BLOCK - in_features))
    grouped = padded.view(out_features, blocks, BLOCK)
    middle = 2 ** (bits - 1)
    scales = grouped.abs().amax(2).clamp_(min=1e-30) / (middle - 1)
    codes = ((grouped / scales[:, :, None]).round_() + middle).to(torch.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft",
        K=in_features, N=out_features, bits=bits, block_size=BLOCK, accuracy_level=accuracy_level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, out_features])],
        [
            numpy_helper.from_array(codes.numpy(), "codes"),
            numpy_helper.from_array(scales.reshape(-1).numpy(), "scales"),
        ],
    )
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()


def _ggml(problem: Problem, threads: int) -> Map:
    return ggml_linear(problem.weight, threads)


# ---- what they refuse ------------------------------------------------------------------------


def _int8pack_refuses(problem: Problem) -> str | None:
    """Its vector loop for 16-bit floats loads aligned rows and takes the process down."""
    in_features = problem.weight.shape[1]
    if problem.dtype != "float32" and in_features % 16:
        return f"crashes the process for K = {in_features}, which 16 does not divide"
    return None


def _quanto_refuses(problem: Problem) -> str | None:
    """It calls torch's kernel for bfloat16 when 4 divides K."""
    in_features = problem.weight.shape[1]
    if problem.dtype == "bfloat16" and in_features % 4 == 0:
        return _int8pack_refuses(problem)
    return None


def _ggml_refuses(problem: Problem) -> str | None:
    in_features = problem.weight.shape[1]
    return f"K = {in_features} is not a multiple of its block of 32" if in_features % 32 else None


def _takes_all(problem: Problem) -> str | None:
    return None


def _plain(problem: Problem) -> str:
    return ""


# ---- the list --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """One way to apply a weight.

    Attributes:
        name: as tables show it.
        kind: "float", "W8A16", "W4A16" or "W8A8".
        package: the distribution that it needs.
        build: makes the map of a problem, for a number of threads.
        dtypes: of activations that it takes.
        refuses: why it cannot be run on a problem, or None.
        per_threads: whether the number of threads is fixed when it is built.
        note: what a reader of its rows should know.
    """

    name: str
    kind: str
    package: str
    build: Callable[[Problem, int], Map]
    dtypes: tuple[str, ...] = ALL
    refuses: Callable[[Problem], str | None] = _takes_all
    per_threads: bool = False
    note: Callable[[Problem], str] = _plain

    @property
    def version(self) -> str | None:
        """Version of the package, or None if it is not installed."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None

    def why_not(self, problem: Problem) -> str | None:
        """Why it does not run on a problem, or None."""
        if problem.dtype not in self.dtypes:
            return f"takes {', '.join(self.dtypes)} only"
        return self.refuses(problem)


BASELINE = "nn.Linear"
FLOAT32 = ("float32",)
NN_LINEAR = Peer(BASELINE, "float", "torch", _nn_linear)
PEERS = (
    NN_LINEAR,
    Peer("cast whole weight", "W8A16", "torch", _cast),
    Peer("torch int8pack", "W8A16", "torch", _int8pack, refuses=_int8pack_refuses),
    Peer("torchao", "W8A16", "torchao", _torchao),
    Peer("quanto", "W8A16", "optimum-quanto", quanto_map, refuses=_quanto_refuses),
    Peer(
        "onnxruntime", "W8A16", "onnxruntime", partial(onnxruntime_map, accuracy_level=1),
        FLOAT32, per_threads=True,
    ),
    Peer(
        "onnxruntime level 4", "W8A8", "onnxruntime", partial(onnxruntime_map, accuracy_level=4),
        FLOAT32, per_threads=True,
    ),
    Peer("quantize_dynamic", "W8A8", "torch", _quantize_dynamic, FLOAT32),
    Peer("bitsandbytes", "W8A8", "bitsandbytes", _bitsandbytes),
    Peer(
        "ggml q8_0", "W8A8", "llama-cpp-python", _ggml, FLOAT32, _ggml_refuses, per_threads=True
    ),
)  # fmt: skip


def installed(peers: tuple[Peer, ...]) -> tuple[list[Peer], dict[str, str]]:
    """Peers whose package is there, and the others with the reason."""
    present = [peer for peer in peers if peer.version is not None]
    absent = {
        peer.name: f"{peer.package} is not installed" for peer in peers if peer.version is None
    }
    return present, absent


def attempt(peer: Peer, problem: Problem, threads: int) -> Map | Failure:
    """The peer's map of a problem, or why it cannot be built."""
    try:
        return peer.build(problem, threads)
    except Exception as error:  # a peer may raise anything
        return Failure(first_line(error))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the peers' warnings and log lines off the tables."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
