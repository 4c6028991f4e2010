"""A saved folder of transformers, opened in a program that imports nothing of this package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.22")
pytest.importorskip("accelerate")

import quantization.integrations.transformers
from quantization import quantize_model
from tests import tiny_models
from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)

_OPEN = """
import sys
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


@pytest.mark.parametrize("installed", [True, False])
def test_a_folder_opens_by_itself_or_names_the_import(installed: bool, tmp_path: Path) -> None:
    model = tiny_models.random_model("llama")
    quantize_model(model, {"lm_head": None, "*": "w8g32"})
    model.save_pretrained(tmp_path / "small")
    info = tmp_path / "site/qwqa-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qwqa\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[torch.backends]\nqwqa = quantization.autoload:register"
    )
    home = Path(quantization.__file__).parent.parent
    places = [str(tmp_path / "site"), str(home)] if installed else [str(home)]
    switch = str(int(installed))  # off: an installed copy is not to help
    run = subprocess.run(
        [sys.executable, "-c", _OPEN, str(tmp_path / "small")],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(places), "TORCH_DEVICE_BACKEND_AUTOLOAD": switch},
        capture_output=True,
        text=True,
        check=False,
    )
    if installed:
        assert run.returncode == 0, run.stderr
        assert run.stdout == "PackedLinearLayer\n"
    else:
        assert run.returncode == 1
        first = next(line for line in run.stderr.splitlines() if line.strip())
        assert "quantization (first: import quantization.integrations.transformers)" in first
