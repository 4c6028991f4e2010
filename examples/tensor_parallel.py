"""A quantized language model over several processes, and that it answers as one process does.

    python examples/tensor_parallel.py                     two processes, random weights
    torchrun --nproc-per-node 4 examples/tensor_parallel.py   four
    torchrun --nproc-per-node 2 examples/tensor_parallel.py --model smollm2

Every process builds and quantizes the same model, keeps the whole of it to compare with, and its
share of a copy. A real program would build the model, share it, and have 1/n of it from then on.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from quantization import quantize_model
from quantization.distributed import RowwiseQuantized, plan_of, tensor_parallel
from quantization.model_sources import load_model
from quantization.quantized_module import QuantizedModule

EPSILON = 2.0**-24


def main() -> int:
    """Share a model, compare its logits with those of the whole one, print what was found."""
    options = _options()
    if "RANK" not in os.environ:
        return _launch(options.processes)
    dist.init_process_group("gloo")
    whole = _model(options.model)
    recipe = {"lm_head": "w8", nn.Embedding: "w8", "*": options.scheme}
    quantize_model(whole, recipe)
    plan = plan_of(whole, dist.get_world_size())
    shared = tensor_parallel(copy.deepcopy(whole), plan=plan)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, whole.config.vocab_size, (1, 24), generator=generator)
    with torch.inference_mode():
        alone, together = whole(words).logits, shared(words).logits
        allowed = _allowed(whole, plan, words, alone)
    difference = float((together - alone).abs().max())
    _tell(whole, shared, plan, difference, allowed)
    dist.destroy_process_group()
    return 0 if difference <= allowed else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="smollm2, or a folder of transformers; none: a random one")
    parser.add_argument("--scheme", default="w4g64a", help="of the layers (w4g64a)")
    parser.add_argument("--processes", type=int, default=2, help="where torchrun starts none (2)")
    return parser.parse_args()


def _launch(processes: int) -> int:
    """What torchrun does: start this program so many times."""
    from torch.distributed import run

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run.main(["--standalone", f"--nproc-per-node={processes}", *sys.argv])
    return 0


def _model(name: str | None) -> nn.Module:
    if name is not None:
        return load_model(name).model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=2, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def _allowed(whole: nn.Module, plan: dict, words: torch.Tensor, logits: torch.Tensor) -> float:
    """How far the logits move if every layer that sums over processes errs as far as it may.

    A sum of K products in float32 errs by at most (K + 2) 2^-24 sum|x w|, in whatever order. Each
    such output is moved by twice that, up or down at random: once for each of two orders.
    """
    generator = torch.Generator().manual_seed(1)

    def err(layer: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        size = args[0].abs() @ layer.weight.abs().T
        signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
        return output + signs * 2 * (layer.in_features + 2) * EPSILON * size

    summed = [name for name, style in plan.items() if isinstance(style, RowwiseQuantized)]
    layers = [whole.get_submodule(name) for name in summed]
    hooks = [layer.register_forward_hook(err) for layer in layers if isinstance(layer, nn.Linear)]
    moved = whole(words).logits
    for hook in hooks:
        hook.remove()
    return float((moved - logits).abs().max())


def _tell(
    whole: nn.Module, shared: nn.Module, plan: dict, difference: float, allowed: float
) -> None:
    rank, count = dist.get_rank(), dist.get_world_size()
    all_bytes, own = _bytes(whole), torch.tensor([_bytes(shared)])
    of_ranks = [torch.zeros_like(own) for _ in range(count)]
    dist.all_gather(of_ranks, own)
    if rank != 0:
        return
    print(f"{count} processes; {len(plan)} layers shared, such as")
    for name, style in list(plan.items())[:8]:
        print(f"  {name}: {style}")
    print(f"bytes of quantized layers, whole: {all_bytes:,}")
    for i, each in enumerate(of_ranks):
        print(f"  process {i}: {int(each):,} ({int(each) / all_bytes:.4f})")
    print(f"largest difference of a logit: {difference:.3g}, allowed: {allowed:.3g}")
    print("same answer" if difference <= allowed else "ANOTHER ANSWER")


def _bytes(model: nn.Module) -> int:
    """Of codes, scales and what belongs to them, those that two layers hold together once."""
    tensors = {
        id(tensor): tensor.nbytes
        for module in model.modules()
        if isinstance(module, QuantizedModule)
        for name in module._weight_names()
        if (tensor := module._buffers[name]) is not None
    }
    return sum(tensors.values())


if __name__ == "__main__":
    raise SystemExit(main())
