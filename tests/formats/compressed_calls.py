"""What the tests of compressed-tensors share: matrices, stored models and folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from safetensors.torch import save_file

from quantization import (
    pack_matrix,
)
from quantization.checkpoint.stored_model import (
    StoredLayer,
    StoredModel,
)

PARTS = ("packed_weights", "scales", "zero_points")


def packed_of(rng: np.random.Generator, name: str, rows: int, cols: int, dtype: Any) -> Any:
    weight = torch.from_numpy(rng.normal(size=(rows, cols))).to(dtype)
    return pack_matrix(weight, name)


def stored_of(layers: dict[str, Any], **more: Any) -> StoredModel:
    return StoredModel(
        {name: StoredLayer.of(packed) for name, packed in layers.items()}, {}, **more
    )


def assert_same(found: Any, packed: Any) -> None:
    """Equal to the last bit, and so is the scheme."""
    assert (found.scheme, found.shape, found.dtype) == (packed.scheme, packed.shape, packed.dtype)
    for part in PARTS:
        mine, theirs = getattr(packed, part), getattr(found, part)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def settings(form: dict[str, Any], layout: str = "int-quantized", **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", **form}}
    plain = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"g": group}}
    return {"quantization_config": plain | more}


def folder_of(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path
