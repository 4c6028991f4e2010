# needs: transformers
"""A quantized language model over several processes answers as in one, and each holds 1/n of it.

python examples/tensor_parallel.py
torchrun --nproc-per-node 4 examples/tensor_parallel.py
torchrun --nproc-per-node 2 examples/tensor_parallel.py --model smollm2
"""

import argparse
import copy
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from quantization import quantize_model
from quantization.demo.model_sources import load_model
from quantization.distributed import allowed_difference, held_bytes, plan_of, tensor_parallel

if "RANK" not in os.environ:  # not by torchrun: do what it does
    from torch.distributed import run

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run.main(["--standalone", "--nproc-per-node=2", *sys.argv])
    raise SystemExit

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="smollm2, or a folder of transformers; none: random weights")
name = parser.parse_args().model
dist.init_process_group("gloo")
torch.manual_seed(0)
if name:
    model = load_model(name).model
else:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=1000)).eval()

quantize_model(model, {"lm_head": "w8", nn.Embedding: "w8", "*": "w4g64a"})
plan = plan_of(model, dist.get_world_size())
shared = tensor_parallel(copy.deepcopy(model), plan=plan)  # the whole one stays, to compare with

words = torch.randint(0, model.config.vocab_size, (1, 24))
with torch.inference_mode():
    difference = float((shared(words).logits - model(words).logits).abs().max())
allowed = allowed_difference(model, plan, lambda model: model(words).logits)
shares = [None] * dist.get_world_size()
dist.all_gather_object(shares, held_bytes(shared))
if dist.get_rank() == 0:
    for layer, style in list(plan.items())[:8]:
        print(f"{layer}: {style}")
    print(f"whole model: {held_bytes(model):,} bytes of codes and scales")
    for rank, each in enumerate(shares):
        print(f"process {rank}: {each:,} bytes ({each / held_bytes(model):.4f})")
    print(f"largest difference of a logit {difference:.3g}, allowed {allowed:.3g}")
assert difference <= allowed, "another answer"
dist.destroy_process_group()
