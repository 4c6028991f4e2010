# needs: transformers, peft
"""Train LoRA over a quantized model, save the adapter, load it, merge it into the codes.

python examples/peft_lora.py
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import quantization.integrations.peft  # noqa: F401 (LoRA layers that merge into codes)
from quantization import quantize_model


def quantized_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    quantize_model(model, "w4g64a", exclude="lm_head")
    return model


def main() -> None:
    ids = torch.tensor([list(b"In the beginning God created the heaven and the earth.")])
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(quantized_model(), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        merged = PeftModel.from_pretrained(quantized_model(), folder).merge_and_unload()
    loss = merged(ids, labels=ids).loss
    print(f"merged, in 4 bits again: loss {loss:.3f}; {merged.model.layers[0].mlp.up_proj}")


if __name__ == "__main__":
    main()
