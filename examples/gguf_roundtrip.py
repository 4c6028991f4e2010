# needs: gguf, transformers, accelerate
"""A quantized Llama into a GGUF file and back: the same logits, and transformers opens the file."""

import tempfile
from pathlib import Path

import torch
import transformers

from quantization import quantize_model
from quantization.checkpoint.restore import restore_model
from quantization.checkpoint.stored_model import stored_model
from quantization.formats.gguf import read_gguf, write_gguf

config = transformers.LlamaConfig(
    vocab_size=128,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = transformers.LlamaForCausalLM(config).eval()
quantize_model(model, {"lm_head": "w8g32+f16", "*": "w4g32+f16"})
tokens = torch.tensor([[1, 17, 4, 99]])

with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    file = Path(folder) / "tiny.gguf"
    for tensor in write_gguf(stored_model(model, config.to_dict()), file)[:4]:
        print(f"{tensor.name:24} {tensor.type:5} moved by {tensor.moved}")

    stored = read_gguf(file)
    fresh = transformers.LlamaForCausalLM(transformers.LlamaConfig(**stored.config)).eval()
    again = restore_model(stored, fresh)
    assert torch.equal(again(tokens).logits, model(tokens).logits)

    opened = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name)
    difference = (opened(tokens).logits - model(tokens).logits).abs().max()
    print(f"the same logits; transformers' own reader differs by {difference:.1e}")
    del stored, again, fresh
