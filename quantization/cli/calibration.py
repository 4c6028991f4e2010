"""What ``--method`` and ``--calibrate`` of the command line mean."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantization.calibration.calibrate import MADE, calibrate
from quantization.calibration.files import load_statistics
from quantization.checkpoint.source.skeleton import skeleton_of_config
from quantization.methods.registry import method_of
from quantization.methods.statistics import Statistics
from quantization.models.recipe import W8A16

__all__ = ["statistics_of", "with_method"]

_BY_HESSIAN = ("gptq", "descent")


def with_method(name: str | None, method: str | None) -> str | None:
    """A scheme's name with the method, where it names none.

    Raises:
        ValueError: if there is no such method.

    Example:
        >>> with_method("w4g32a", "lsq"), with_method("w4:gptq", "lsq"), with_method("w8a16", "lsq")
        ('w4g32a:lsq', 'w4:gptq', 'w8a16')
    """
    if method is None or name is None or ":" in name or name == W8A16:
        return name
    method_of(method)
    return f"{name}:{method}"


def statistics_of(options: argparse.Namespace, recipe: Any) -> Mapping[str, Statistics] | None:
    """What ``--calibrate`` asks for; None without it.

    Raises:
        ValueError: if a method of the recipe needs what was not asked for.
    """
    rules = recipe.values() if isinstance(recipe, dict) else [recipe]
    named = {str(rule).partition(":")[2] for rule in rules if rule is not None}
    hessian = sorted(named & {*_BY_HESSIAN})
    if options.calibrate is None:
        if hessian:
            raise ValueError(
                f"the method {hessian[0]} needs the Hessian of the layers' inputs: add --calibrate "
                "self (a causal language model), --calibrate random, or a file of save_statistics"
            )
        return None
    if options.calibrate not in MADE:
        return load_statistics(Path(options.calibrate))
    kind = type(skeleton_of_config(options.source))
    model = kind.from_pretrained(options.source).eval()  # type: ignore[attr-defined]
    wanted = "hessian" if hessian else "moments"
    return calibrate(model, options.calibrate, statistics=wanted, progress=True)
