"""Tiny random models in the formats of real ones, and the words that their tokenizer knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

WORDS = ["and", "the", "of", "to", "in", "it", "was", "that", "he", "for", "lord", "god", "said"]


def tokenizer_for(transformers):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "[PAD]", *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]"
    )


def save_llama(folder: Path) -> Path:
    """A language model, as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer_for(transformers).save_pretrained(folder)
    return folder


def save_bert(folder: Path) -> Path:
    """An encoder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=16,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer_for(transformers).save_pretrained(folder)
    return folder


def save_gguf(path: Path) -> Path:
    """The smallest Llama that the GGUF reader of transformers takes."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(300)
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", *(f"t{i}" for i in range(294))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 297)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd.weight": (300, 64),
        "output_norm.weight": (64,),
        "blk.0.attn_norm.weight": (64,),
        "blk.0.ffn_norm.weight": (64,),
        "blk.0.attn_q.weight": (64, 64),
        "blk.0.attn_k.weight": (32, 64),
        "blk.0.attn_v.weight": (32, 64),
        "blk.0.attn_output.weight": (64, 64),
        "blk.0.ffn_gate.weight": (96, 64),
        "blk.0.ffn_up.weight": (96, 64),
        "blk.0.ffn_down.weight": (64, 96),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_tokenizer(transformers):
    """A tokenizer that knows every text: a token a byte, and three special ones."""
    tokenizers = pytest.importorskip("tokenizers")
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


_SIZES = {
    "vocab_size": 264,  # every byte, special tokens, and some of no use
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def random_model(kind: str, **options):
    """A small random model of transformers in eval mode: llama, tied, gpt2, bert, t5 or mixtral."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    decoder = _SIZES | special | {"num_key_value_heads": 2, "tie_word_embeddings": False}
    match kind:
        case "llama" | "tied":
            tied = {"tie_word_embeddings": kind == "tied"}
            config = transformers.LlamaConfig(**decoder | tied | options)
            model = transformers.LlamaForCausalLM(config)
        case "mixtral":
            config = transformers.MixtralConfig(
                **decoder | {"num_local_experts": 4, "num_experts_per_tok": 2} | options
            )
            model = transformers.MixtralForCausalLM(config)
        case "gpt2":
            sizes = {"vocab_size": 264, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
            model = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(**sizes | special | options)
            )
        case "bert":
            model = transformers.BertForMaskedLM(transformers.BertConfig(**_SIZES | options))
        case "t5":
            sizes = {"vocab_size": 264, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4}
            config = transformers.T5Config(
                **sizes | {"num_layers": 2, "decoder_start_token_id": 0} | options
            )
            model = transformers.T5ForConditionalGeneration(config)
    return model.eval()


def inputs_for(kind: str):
    """Tokens for a model of that kind."""
    ids = torch.arange(3, 15).view(2, 6)
    return {"input_ids": ids} | ({"decoder_input_ids": ids + 20} if kind == "t5" else {})
