#!/usr/bin/env bash
# CompressedTensorsConfig(dequantize=True) decodes every layer by the first group of the config.
#
# A checkpoint of compressed-tensors may name several groups, such as attention in 8 bits and the
# rest in 4. Without dequantize=True each layer is decoded by its own group. With it, transformers
# takes the first group for all of them: the layers of the others become wrong weights of the
# right shape, and nothing is said.
#
# Seen on 2026-11-30 with transformers 5.24.0, compressed-tensors 0.20.0, torch 2.13.0. Fails if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.0 accelerate
cd "$place"
"$place/venv/bin/python" - <<'PYTHON'
import tempfile

import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
floats = model.model.layers[0].mlp.up_proj.weight.detach().clone()


def group(target, bits):
    form = {"num_bits": bits, "type": "int", "symmetric": True}
    return {"targets": [target], "weights": form | {"strategy": "group", "group_size": 32}}


groups = {"attention": group("re:.*self_attn.*_proj", 8), "rest": group("re:.*mlp.*_proj", 4)}
apply_quantization_config(
    model,
    QuantizationConfig(
        config_groups=groups,
        format="pack-quantized",
        ignore=["lm_head"],
        quantization_status="compressed",
    ),
)
for module in model.modules():
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is not None:
        parts = module.weight.detach().view(len(module.weight), -1, 32)
        scale, _ = calculate_qparams(parts.amin(-1), parts.amax(-1), scheme.weights)
        module.weight_scale.data.copy_(scale)
compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
compressor.compress_model(model)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    compressor.update_config(folder)
    off = {}
    for whole in (False, True):
        config = CompressedTensorsConfig(dequantize=whole)
        loaded = LlamaForCausalLM.from_pretrained(folder, quantization_config=config).eval()
        if not whole:
            with torch.no_grad():
                loaded(torch.arange(8)[None])
        weight = loaded.model.layers[0].mlp.up_proj.weight
        off[whole] = float((weight - floats).norm() / floats.norm())
print("relative error of a weight of the second group:", off)
assert off[False] < 0.15 < 0.5 < off[True]
PYTHON
