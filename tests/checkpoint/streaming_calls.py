"""What the tests of streaming share."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")


RULES = {"re:embed": "w8", "up_proj": "nf4", "*": "w4g32a"}
