# needs: transformers, accelerate
"""Load codes into an empty model, and run it with its layers in memory and on the disk.

python examples/accelerate_offload.py
"""

import tempfile
from pathlib import Path

import torch
from accelerate import disk_offload, init_empty_weights, load_checkpoint_and_dispatch
from transformers import LlamaConfig, LlamaForCausalLM

from quantization import quantize_model

CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4,
)  # fmt: skip


def in_memory(model: torch.nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)


def main() -> None:
    ids = torch.tensor([[1, 2, 3]])
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        model = LlamaForCausalLM(CONFIG).eval()
        quantize_model(model, "w4g64a", exclude="lm_head")
        model.save_pretrained(Path(place, "codes"))

        with init_empty_weights(include_buffers=False):
            empty = LlamaForCausalLM(CONFIG).eval()
        quantize_model(empty, "w4g64a", exclude="lm_head")  # shapes only
        loaded = load_checkpoint_and_dispatch(empty, Path(place, "codes"), device_map={"": "cpu"})
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        print(f"loaded: {in_memory(loaded):,} bytes in memory")

        disk_offload(loaded, Path(place, "disk"), execution_device="cpu", offload_buffers=True)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        print(f"offloaded: {in_memory(loaded):,} bytes in memory, the same answer")


if __name__ == "__main__":
    main()
