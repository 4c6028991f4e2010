"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from quantization import _kernels


@pytest.fixture(params=_kernels.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn; the earlier one is restored."""
    before = _kernels.active_isa()
    _kernels.set_isa(request.param)
    yield request.param
    _kernels.set_isa(before)
