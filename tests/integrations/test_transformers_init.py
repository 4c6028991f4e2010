"""Nothing that was read is drawn anew, in families whose modules initialise their children."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.22")
pytest.importorskip("accelerate")

from safetensors.torch import load_file, save_file
from torch import nn

from quantization import PackedLinearLayer, quantize_model
from quantization.integrations.transformers import QuantizationConfig
from tests.integrations.saved_models import assert_same, quantized
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
_TEXT = _SIZES | {"vocab_size": 128, "max_position_embeddings": 32}
_SHORT_TEXT = _TEXT | {"projection_size": 64}
_DECODER = _TEXT | {"num_key_value_heads": 2, "pad_token_id": 0, "head_dim": 16}
_VISION = _SIZES | {"image_size": 32, "patch_size": 8}
_T5 = {
    "vocab_size": 128,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_SPEECH = _SIZES | {
    "conv_dim": (32, 32),
    "conv_kernel": (8, 4),
    "conv_stride": (4, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
    "codevector_dim": 32,
    "proj_codevector_dim": 32,
    "output_hidden_size": 64,
    "classifier_proj_size": 32,
    "use_weighted_layer_sum": True,
}
_SEW = _SPEECH | {"squeeze_factor": 2}
_BOTH = {"text_config": _SHORT_TEXT, "vision_config": _VISION}

#: Class of the model -> sizes of its config.
FAMILIES: dict[str, dict[str, Any]] = {
    "SiglipModel": _BOTH,
    "SiglipForImageClassification": _BOTH,
    "Siglip2Model": {
        "text_config": _SHORT_TEXT,
        "vision_config": _SIZES | {"num_patches": 16, "patch_size": 8},
    },
    "CLIPModel": _BOTH,
    "Wav2Vec2ForCTC": _SPEECH,
    "Wav2Vec2ForPreTraining": _SPEECH,
    "Wav2Vec2ForSequenceClassification": _SPEECH,
    "Wav2Vec2ConformerForPreTraining": _SPEECH,
    "Wav2Vec2BertForCTC": _SPEECH,
    "WavLMForCTC": _SPEECH,
    "UniSpeechForCTC": _SPEECH,
    "UniSpeechSatForCTC": _SPEECH,
    "HubertForCTC": _SPEECH,
    "Data2VecAudioForCTC": _SPEECH,
    "SEWForCTC": _SEW,
    "T5ForConditionalGeneration": _T5,
    "T5ForQuestionAnswering": _T5,
    "MT5ForTokenClassification": _T5,
    "UMT5ForConditionalGeneration": _T5,
    "SwitchTransformersForConditionalGeneration": _T5 | {"num_experts": 2, "num_decoder_layers": 1},
    "LongT5Model": _T5,
    "RecurrentGemmaForCausalLM": _DECODER | {"lru_width": 64, "attention_window_size": 16},
    "MambaForCausalLM": {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1},
    "ViTForImageClassification": _VISION,
    "BertForMaskedLM": _TEXT,
    "Qwen2ForCausalLM": _DECODER,
}


def saved(name: str, folder: Path) -> type:
    """A small model whose biases and norms are not those of a fresh one, in a folder; its class."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**FAMILIES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.1, 0.2)
    model.save_pretrained(folder)
    return cls


def seeded(load: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    return load(*arguments, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_that_of_quantize_model(name: str, tmp_path: Path) -> None:
    cls = saved(name, tmp_path / "float")
    wanted = seeded(cls.from_pretrained, tmp_path / "float")
    config = QuantizationConfig("w8g32")
    config.quantize(wanted)
    model = seeded(cls.from_pretrained, tmp_path / "float", quantization_config=config)
    assert_same(model, wanted)
    assert quantized(model)

    model.save_pretrained(tmp_path / "codes")
    assert_same(seeded(cls.from_pretrained, tmp_path / "codes"), model)


def test_a_bias_that_is_missing_is_drawn_as_that_of_the_float_model(tmp_path: Path) -> None:
    cls = saved("SiglipModel", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "vision_model.encoder.layers.0.mlp.fc1.bias"
    del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    wanted = seeded(cls.from_pretrained, tmp_path)
    quantize_model(wanted, "w8g32")
    model = seeded(cls.from_pretrained, tmp_path, quantization_config=QuantizationConfig("w8g32"))
    assert_same(model, wanted)


def test_the_patch_of_layers_ends_with_the_drawing(tmp_path: Path) -> None:
    cls = saved("Wav2Vec2ForPreTraining", tmp_path)
    cls.from_pretrained(tmp_path, quantization_config=QuantizationConfig("w8g32"))
    layer = PackedLinearLayer(64, 8, scheme="w8g32")
    before = layer.packed_weights.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.packed_weights, before)
    assert not hasattr(layer.weight, "_is_hf_initialized")
    assert isinstance(layer, nn.Linear)
