"""The tests, room by room as the package is: `tests/schemes` beside `quantization/schemes`."""

from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)
