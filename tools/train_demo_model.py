"""Train the character model that ships in `quantization/demo` and cut its held-out text.

The text is the King James Bible, in the public domain (see `quantization/demo/SOURCE.txt`). On
Debian or Ubuntu:

    apt-get install bible-kjv
    bible -f gen1:1-rev22:21 > kjv.txt
    python tools/train_demo_model.py kjv.txt

`bible` prints a verse a line behind a reference such as `Ge1:1`. References are dropped; chapters
are split by a seeded draw into the training text and exactly 200 000 bytes of held-out text, which
the training never reads. Everything hangs on `--seed`: on one machine and one torch version a
second run writes the same bytes. About 25 minutes on one core with the defaults.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
import time
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as functional

sys.path.insert(0, str(Path(__file__).parents[1]))
from quantization.demo import char_model

HELD_OUT_BYTES = 200_000
REFERENCE = re.compile(r"(\d?[A-Za-z]+\d+):\d+ (.*)")


def chapters(text: str) -> list[str]:
    verses = [match.groups() for match in map(REFERENCE.fullmatch, text.splitlines()) if match]
    if not verses:
        raise SystemExit("no line looks like 'Ge1:1 In the beginning ...'; see the docstring")
    return [
        "\n".join(verse for _, verse in chapter) + "\n"
        for _, chapter in groupby(verses, key=lambda pair: pair[0])
    ]


def split(parts: list[str], seed: int) -> tuple[str, str]:
    """Training and held-out text; both keep the order of the book."""
    order = list(range(len(parts)))
    random.Random(seed).shuffle(order)
    held, size = set(), 0
    while size < HELD_OUT_BYTES:
        held.add(order.pop())
        size = sum(len(parts[index].encode()) + 1 for index in held)
    train = "\n".join(part for index, part in enumerate(parts) if index not in held)
    held_out = "\n".join(parts[index] for index in sorted(held))
    return train, held_out.encode()[:HELD_OUT_BYTES].decode()


def rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 2 % of the steps, then a cosine down to nothing."""
    warm = max(1, steps // 50)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def optimizer_for(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only."""
    matrices = [value for value in model.parameters() if value.ndim >= 2]
    vectors = [value for value in model.parameters() if value.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def train(model: char_model.CharModel, text: str, held_out: str, arguments) -> None:
    ids, context, started = model.encode(text), model.context, time.monotonic()
    generator = torch.Generator().manual_seed(arguments.seed)
    optimizer, smooth = optimizer_for(model), 0.0
    for step in range(arguments.steps):
        starts = torch.randint(len(ids) - context, (arguments.batch,), generator=generator)
        rows = ids[starts[:, None] + torch.arange(context + 1)]
        loss = functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, arguments.steps, arguments.peak_rate)
        optimizer.step()
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == arguments.steps:
            char_model.save(model, arguments.out / "char_model.npz")
            bits = char_model.bits_per_character(model, held_out[:20_000])
            print(
                f"step {step + 1}/{arguments.steps}  {time.monotonic() - started:.0f} s  "
                f"train {smooth / math.log(2):.3f}  held-out {bits:.3f} bits a character",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path, help="what `bible -f gen1:1-rev22:21` prints")
    parser.add_argument("--out", type=Path, default=char_model.FOLDER)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--peak-rate", type=float, default=3e-3)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    text, held_out = split(chapters(arguments.text.read_text()), arguments.seed)
    (arguments.out / "held_out.txt").write_text(held_out)
    vocabulary = "".join(sorted(set(text)))
    model = char_model.CharModel(
        vocabulary, arguments.width, arguments.layers, arguments.heads, arguments.context
    )
    count = sum(value.numel() for value in model.parameters())
    print(f"{len(text)} training characters, {len(vocabulary)} kinds, {count} parameters")
    train(model, text, held_out, arguments)
    print(char_model.bits_per_character(model.eval(), held_out), "bits a character, all held-out")
    print(char_model.continue_text(model, "And it came to pass", 400))


if __name__ == "__main__":
    main()
