"""Every architecture of transformers that can be built small, bit for bit, on two roads.

One quantizes while it loads, the other streams the files; what both are held against is
``quantize_model`` on the loaded float model.
"""

from __future__ import annotations

import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.22")
pytest.importorskip("accelerate")

from quantization import load_quantized, quantize_checkpoint, unfuse_experts
from quantization.integrations.transformers import QuantizationConfig
from tests.integrations.architectures import registry, small_config
from tests.integrations.saved_models import assert_same
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

PARTS = 24


def saved(cls: Any, config: Any, dtype: torch.dtype, folder: Path) -> None:
    """Save a model whose biases and norms are not those of a fresh one."""
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.is_floating_point():
                parameter.normal_(0.1, 0.2)
    model.to(dtype).save_pretrained(folder)


def loaded(cls: Any, folder: Path, **options: Any) -> Any:
    torch.manual_seed(1)
    return cls.from_pretrained(folder, **options).eval()


def compare(cls: Any, wanted: Any, folder: Path) -> None:
    """Hold both roads against the float model ``wanted`` that is quantized in memory."""
    config = QuantizationConfig("w8g32", unfuse_experts=True)
    unfuse_experts(wanted)
    config.quantize(wanted)
    assert_same(loaded(cls, folder / "float", quantization_config=config), wanted)
    heads = any(name.rpartition(".")[2] == "lm_head" for name, _ in wanted.named_modules())
    quantize_checkpoint(
        folder / "float",
        folder / "small",
        "w8g32",
        exclude=["lm_head"] if heads else [],
        unfuse_experts=True,
    )
    assert_same(load_quantized(folder / "small"), wanted)


def tried(names: list[str], dtype: torch.dtype, folder: Path) -> tuple[str, str]:
    """What became of the first class of a type that can be built: a word, and what to say."""
    reasons = {}
    for name in names:
        try:
            cls = getattr(transformers, name)
            saved(cls, small_config(cls), dtype, folder / "float")
            wanted = loaded(cls, folder / "float")
        except (Exception, SystemExit) as error:
            reasons[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            shutil.rmtree(folder, ignore_errors=True)
            continue
        try:
            compare(cls, wanted, folder)
        except Exception as error:
            return "different", f"{name}: {type(error).__name__}: {error}"[:1000]
        return "equal", name
    name, reason = next(iter(reasons.items()))
    return "skipped", f"{name}: {reason}"


@pytest.mark.deep
@pytest.mark.parametrize("part", range(PARTS))
def test_every_architecture(part: int, tmp_path: Path, capsys: Any) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.disable_progress_bar()
    counts: Counter[str] = Counter()
    wrong = []
    for index, (kind, names) in enumerate([*registry().items()][part::PARTS]):
        dtype = (torch.float32, torch.bfloat16)[index % 2]
        word, said = tried(names, dtype, tmp_path / kind)
        counts[word] += 1
        shutil.rmtree(tmp_path / kind, ignore_errors=True)
        if word == "different":
            wrong.append(f"{kind}: {said}")
        elif word == "skipped":
            with capsys.disabled():
                print(f"\nskipped {kind}: {said}", end="")
    with capsys.disabled():
        print(f"\npart {part} of {PARTS}: {dict(counts)}", end="")
    assert counts["equal"] and not wrong, "\n".join(wrong)
