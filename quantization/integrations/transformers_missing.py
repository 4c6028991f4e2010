"""Layers whose weight a checkpoint lacks: they stay in float, to be trained, and are reported.

A model for a new task (classification, question answering, regression) gets a head that the
checkpoint of its body does not have. transformers draws its numbers; as codes they could not learn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from torch import nn

from quantization.integrations.transformers_init import is_initialized
from quantization.swap.report import Candidate, FloatTensor, ReplacementReport

__all__ = ["REASON", "is_drawn", "leave_in_float", "refuse_left"]

REASON = "the checkpoint has no weight for it: it stays in float, to be trained"


def is_drawn(parameters: Iterable[nn.Parameter | None]) -> bool:
    """Whether one of the Parameters was drawn at random, as nothing was read for it.

    Example:
        >>> is_drawn(nn.Linear(2, 2).parameters())
        True
    """
    here = [each for each in parameters if each is not None and not each.is_meta]
    return any(not is_initialized(each) for each in here)


def refuse_left(names: Collection[str]) -> None:
    """What ``strict`` says of layers that are left.

    Raises:
        ValueError: if there are any.

    Example:
        >>> refuse_left([])
    """
    if names:
        lines = [f"  {name}: {REASON}" for name in sorted(names)]
        raise ValueError(
            f"strict: {len(names)} layers would be left in float; exclude them by name if that is "
            "meant\n" + "\n".join(lines)
        )


def leave_in_float(
    report: ReplacementReport, names: Collection[str], model: nn.Module
) -> ReplacementReport:
    """The report of a plan, of which these layers were not quantized after all.

    Args:
        report: that says they were replaced.
        names: their dotted names.
        model: it has them.
    """
    lost = [c for c in report.replaced if c.name in names]
    saved = sum(each.bytes_before - each.bytes_after for each in lost)
    held = sum(c.weights for c in report if c.bits_per_weight is not None)
    share = sum(each.weights for each in lost) / held if held else 0.0
    tensors = [*report.float_tensors, *_weights_of(lost, model)]
    return replace(
        report,
        candidates=tuple(_left(c) if c in lost else c for c in report),
        float_tensors=tuple(sorted(tensors, key=lambda tensor: -tensor.nbytes)),
        bytes_before=report.bytes_before - sum(each.bytes_before for each in lost),
        bytes_after=report.bytes_after - sum(each.bytes_after for each in lost),
        model_bytes_after=report.model_bytes_after + saved,
        coverage=report.coverage * (1 - share),
    )


def _left(candidate: Candidate) -> Candidate:
    return replace(
        candidate,
        status="left",
        reason=REASON,
        bytes_after=candidate.bytes_before,
        scheme="",
        bits_per_weight=None,
    )


def _weights_of(lost: list[Candidate], model: nn.Module) -> Iterable[FloatTensor]:
    for candidate in lost:
        weight = model.get_submodule(candidate.name).weight
        dtype = str(weight.dtype).removeprefix("torch.")
        yield FloatTensor(f"{candidate.name}.weight", tuple(weight.shape), dtype, weight.nbytes)
