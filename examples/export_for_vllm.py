# needs: transformers
"""Write a quantized language model as vLLM and transformers read it: compressed-tensors."""

import json
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quantization import quantize_model
from quantization.checkpoint.restore import restore_model
from quantization.checkpoint.stored_model import stored_model
from quantization.formats.compressed_tensors import (
    read_compressed_tensors,
    write_compressed_tensors,
)

# A small random model; LlamaForCausalLM.from_pretrained(folder) gives a real one.
shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
config = LlamaConfig(vocab_size=1000, num_attention_heads=4, num_key_value_heads=2, **shape)
model = LlamaForCausalLM(config).to(torch.bfloat16).eval()

quantize_model(model, "w4g128", exclude=["lm_head"])
with tempfile.TemporaryDirectory() as place:
    folder = Path(place) / "llama-w4a16"
    write_compressed_tensors(stored_model(model, json.loads(config.to_json_string())), folder)
    print(sorted(path.name for path in folder.iterdir()), "\nserve it: vllm serve", folder.name)

    again = restore_model(
        read_compressed_tensors(folder), LlamaForCausalLM(config).to(torch.bfloat16).eval()
    )
    tokens = torch.tensor([[1, 2, 3]])
    print("same bits:", torch.equal(again(tokens).logits, model(tokens).logits))
