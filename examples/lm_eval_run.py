# needs: transformers, lm_eval, tokenizers
"""Evaluate a quantized model with lm-eval: HFLM takes the model object.

    python examples/lm_eval_run.py

Offline, with a small random model and a tokenizer of bytes. With a real model and the network it
is ``lm_eval.simple_evaluate(model=lm, tasks=["lambada_openai"])``.
"""

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantization import quantize_model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokens = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def main() -> None:
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    quantize_model(model, "w4g64a", exclude="lm_head")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")

    questions = [("The capital of France is", answer) for answer in (" Paris", " Rome")]
    requests = [Instance("loglikelihood", {}, each, i) for i, each in enumerate(questions)]
    for (_, answer), (score, greedy) in zip(questions, lm.loglikelihood(requests), strict=True):
        print(f"log likelihood of {answer!r}: {score:.2f} (greedy: {greedy})")


if __name__ == "__main__":
    main()
