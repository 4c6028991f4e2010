"""``python -m benchmarks families``: models of transformers that look at a weight in each call.

T5 and its kin read ``layer.weight.dtype`` of a linear layer every time it is called, which costs
nothing while the weight is a tensor. Models of random weights in the sizes of T5-small, one thread;
a whole call of 16 tokens into either side, and the step of one new token that a reader waits for.
"""

from __future__ import annotations

import argparse
import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.harness import Candidate, Pace, Timing, take_turns
from benchmarks.session import threads_of_torch
from quantization import quantize_model

FLOAT = "float32"
SCHEMES = ("w8a16", "w8", "w4", "nf4")
TOKENS = 16

_VOCABULARY = {"vocab_size": 4096}
_T5 = _VOCABULARY | {"num_layers": 3, "num_decoder_layers": 3, "decoder_start_token_id": 0}
_WIDE = _VOCABULARY | {"d_model": 512, "hidden_size": 512, "d_ff": 2048, "num_heads": 8}
_FFN = {"encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
_LAYERS = {"encoder_layers": 3, "decoder_layers": 3}
_HEADS = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}

#: Class of the model -> what its config has of T5-small that its defaults have not.
FAMILIES: dict[str, dict[str, Any]] = {
    "T5ForConditionalGeneration": _T5,
    "MT5ForConditionalGeneration": _T5 | {"d_ff": 2048, "num_heads": 8},
    "UMT5ForConditionalGeneration": _T5 | {"d_ff": 2048, "num_heads": 8},
    "LongT5ForConditionalGeneration": _T5,
    "SwitchTransformersForConditionalGeneration": _T5 | _WIDE | {"num_experts": 4},
    "UdopForConditionalGeneration": _T5 | _WIDE,
    "Pix2StructTextModel": _WIDE | {"num_layers": 3, "initializer_range": 0.02},
    "NllbMoeForConditionalGeneration": _WIDE | _FFN | _LAYERS | _HEADS | {"num_experts": 4},
    "SeamlessM4TForTextToText": _WIDE | _FFN | _LAYERS | _HEADS,
}


def model_of(name: str) -> nn.Module:
    """A random model in float32."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**FAMILIES[name])).eval()


def calls_of(model: Any) -> dict[str, dict[str, Any]]:
    """Arguments of a whole call, and of the step of one token."""
    ids = torch.arange(10, 10 + TOKENS)[None]
    if not model.config.is_encoder_decoder:
        return {"call": {"input_ids": ids}, "step": {"input_ids": ids[:, :1]}}
    source = {"input_ids": ids}
    if isinstance(model, transformers.UdopForConditionalGeneration):
        source["bbox"] = torch.zeros(1, TOKENS, 4)
    step = {"encoder_outputs": model.get_encoder()(**source), "decoder_input_ids": ids[:, :1]}
    return {"call": source | {"decoder_input_ids": ids}, "step": step}


@torch.no_grad()
def measure(name: str, seconds: float) -> dict[str, Any]:
    """Seconds of float32, and how many times faster each scheme is, turn by turn."""
    plain = model_of(name)
    calls, models = calls_of(plain), {FLOAT: plain}
    for scheme in SCHEMES:
        models[scheme] = copy.deepcopy(plain)
        quantize_model(models[scheme], scheme, exclude="re:lm_head|shared|embed|router|classifier")
    found: dict[str, Any] = {"family": name}
    for kind, arguments in calls.items():
        candidates = [
            Candidate(key, "ours", partial(model, use_cache=False, **arguments))
            for key, model in models.items()
        ]
        times = take_turns(candidates, Pace(rounds=40, seconds=seconds, sample=0.0))
        base = times[FLOAT]
        if not isinstance(base, Timing):
            raise RuntimeError(f"{name}: {base.reason}")
        found[f"{kind}, ms"] = 1e3 * base.median
        for scheme in SCHEMES:
            timing = times[scheme]
            if not isinstance(timing, Timing):
                raise RuntimeError(f"{name} as {scheme}: {timing.reason}")
            found[f"{kind} {scheme}"] = base.median / timing.median
    return found


def main(arguments: list[str]) -> int:
    """Print a table; the exit code is 0 unless the arguments are wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks families", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seconds", type=float, default=8.0, help="of a cell, all together")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    found = []
    with threads_of_torch(1):
        for name in options.only:
            found.append(measure(name, options.seconds))
            if len(found) == 1:
                print("| " + " | ".join(found[0]) + " |\n|" + "---|" * len(found[0]))
            print(
                "| " + " | ".join(_text(value) for value in found[-1].values()) + " |", flush=True
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"
