"""What the package offers is listed, sorted, and there."""

import importlib

import pytest

ROOMS = ("", ".cores", ".modules", ".objectives", ".data", ".envs", ".checks")


@pytest.mark.parametrize("name", ROOMS)
def test_all_is_sorted_and_true(name):
    module = importlib.import_module(f"cyborg_torchrl{name}")
    in_order = sorted(module.__all__, key=lambda item: (not item.isupper(), not item[0].isupper(), item))
    assert list(module.__all__) == in_order, "constants, then classes, then functions, as the linter sorts them"
    assert all(hasattr(module, item) for item in module.__all__)
