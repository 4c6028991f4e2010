"""What the accuracy of is measured: a line a way from a model to codes."""

from __future__ import annotations

from typing import NamedTuple


class Cell(NamedTuple):
    """One way to quantize a model.

    Attributes:
        label: what the table calls it, unique among cells.
        recipe: as `quantize_model` takes it; of a peer, what its adapter takes.
        method: as `quantize_model` takes it, or None for its default.
        calibration: None; ``"random"``, ``"self"``, ``"text"`` for moments from random ids, text of
            the model's own, or the text for calibrating; with ``"hessian:"`` before it, all of it.
        peer: whose package does it, a name in `accuracy_peers.PEERS`; None: ours.
    """

    label: str
    recipe: str
    method: str | None = None
    calibration: str | None = None
    peer: str | None = None


def _plain(*recipes: str) -> list[Cell]:
    return [Cell(recipe.removesuffix("+f16"), recipe) for recipe in recipes]


def _fitted(method: str, calibration: str | None, *recipes: str) -> list[Cell]:
    said = {None: "no data"}.get(calibration, f"{calibration} tokens".replace("hessian:", ""))
    return [Cell(f"{recipe}:{method}, {said}", recipe, method, calibration) for recipe in recipes]


#: Scales are kept in float16, so that what is measured is what the bits say.
CELLS = (
    *_plain("w8+f16", "w6g64a+f16", "w5g64a+f16"),
    *_plain("w4g64+f16", "w4g64a+f16", "w4g32a+f16", "w4g64af+f16", "w4g32af+dq"),
    *_plain("nf4+f16", "nf4g32+f16", "fp4+f16", "mxfp4"),
    *_plain("w3g64+f16", "w3g64a+f16", "w3g32a+f16", "kmeans3r+f16"),
    *_plain("w2g64a+f16", "w2g32a+f16"),
    *_fitted("lsq", None, "nf4g32+dq", "w4g32af+dq", "w3g32af+dq"),
    *_fitted("lsq", "random", "w4g64af+dq", "w4g32af+dq", "w3g64af+dq", "w3g32af+dq", "w2g32af+dq"),
    *_fitted("lsq", "self", "w4g64af+dq", "w4g32af+dq", "w3g32af+dq", "w2g32af+dq"),
    *_fitted("hqq", None, "w4g64af+f16", "w3g64af+f16", "w4g32af+dq", "w3g32af+dq"),
    *_fitted("sinq", None, "w4g64a+f16+cols", "w3g64a+f16+cols", "w2g64a+f16+cols"),
    *_fitted("sinq", None, "nf4g32+dq+cols", "w4g32a+dq+cols", "w3g32a+dq+cols"),
    *_fitted("sinq_lsq", None, "w4g32af+dq+cols", "w4g32a+dq+cols", "nf4g32+dq+cols"),
    *_fitted("sinq_lsq", None, "w3g32af+dq+cols", "w3g32a+dq+cols", "w2g32af+dq+cols"),
    *_fitted("sinq_lsq", "random", "w4g32af+dq+cols", "w3g32af+dq+cols"),
    *_fitted("awq", "random", "w4g64a+f16+cols", "w3g64a+f16+cols"),
    *_fitted("gptq", "hessian:random", "w3g32af+dq"),
    *_fitted("descent", "hessian:random", "w4g64af+dq", "w4g32af+dq", "w3g64af+dq"),
    *_fitted("descent", "hessian:random", "w3g32af+dq", "w2g32af+dq", "w3g32a+dq"),
    *_fitted("descent", "hessian:self", "w4g32af+dq", "w3g32af+dq", "w2g32af+dq"),
    Cell("HQQ 4 g64", "4g64", peer="hqq"),
    Cell("HQQ 3 g64", "3g64", peer="hqq"),
    Cell("HQQ 2 g64", "2g64", peer="hqq"),
    Cell("SINQ 4 g64", "4g64", peer="sinq"),
    Cell("SINQ 3 g64", "3g64", peer="sinq"),
    Cell("SINQ 2 g64", "2g64", peer="sinq"),
    Cell("auto-round opt-rtn 4 g64", "4g64", None, "random", "opt-rtn"),
    Cell("auto-round opt-rtn 3 g64", "3g64", None, "random", "opt-rtn"),
    Cell("auto-round NeUQI 3 g64", "3g64", None, "random", "neuqi"),
    Cell("llama.cpp Q4_0", "q4_0", None, "random", "llama.cpp"),
    Cell("llama.cpp Q4_K", "q4_K", None, "random", "llama.cpp"),
    Cell("llama.cpp IQ4_NL", "iq4_nl", None, "random", "llama.cpp"),
    Cell("llama.cpp Q3_K", "q3_K", None, "random", "llama.cpp"),
    Cell("llama.cpp Q2_K", "q2_K", None, "random", "llama.cpp"),
)
