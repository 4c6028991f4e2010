from tests.unittest_bridge import pytest_cases

load_tests = pytest_cases(__file__)
