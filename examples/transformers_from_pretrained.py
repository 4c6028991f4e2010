# needs: transformers, accelerate
"""Quantize a model while it loads, save it, and load it without arguments.

    python examples/transformers_from_pretrained.py [folder or hub name]

Without an argument a small random model is made first.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from quantization.integrations.transformers import QuantizationConfig


def random_model(folder: Path) -> Path:
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        source = sys.argv[1] if sys.argv[1:] else random_model(Path(place, "float"))
        rules = {"re:(embed_tokens|lm_head)$": "w8g64", "re:mlp": "w4g64a", "*": "w8a16"}
        config = QuantizationConfig(rules, exclude=())
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
        print(model.hf_quantizer.report)

        model.save_pretrained(Path(place, "codes"))
        again = AutoModelForCausalLM.from_pretrained(Path(place, "codes"))
        prompt = torch.tensor([[1, 2, 3]])
        out = again.generate(prompt, max_new_tokens=5, do_sample=False)
        assert torch.equal(out, model.generate(prompt, max_new_tokens=5, do_sample=False))
        print(f"{again.get_memory_footprint():,} bytes; {prompt.tolist()} -> {out.tolist()}")


if __name__ == "__main__":
    main()
