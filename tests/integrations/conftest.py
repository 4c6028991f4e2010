"""What the tests of the libraries share: folders of small float models, and quiet ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def floats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small float models, as transformers saves them."""
    from tests import tiny_models
    from tests.integrations import saved_models

    folders = {}
    for kind in saved_models.KINDS:
        folders[kind] = tmp_path_factory.mktemp(kind)
        tiny_models.random_model(kind).save_pretrained(folders[kind])
    return folders


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers = pytest.importorskip("transformers", minversion="5.22")
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)
