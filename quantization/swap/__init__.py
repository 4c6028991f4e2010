"""One layer of a model into another: walking, patterns, the two-phase engine, the report."""

from collections.abc import Callable
from typing import Any

#: Called with each model some layers of which were swapped; what stands above adds itself here.
OBSERVERS: list[Callable[[Any], None]] = []
