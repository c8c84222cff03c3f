"""Lookup of components by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cyborg_torchrl import registry as registry_module
from cyborg_torchrl.cores import build_gru
from cyborg_torchrl.registry import Registry, UnknownNameError, backbones, did_you_mean


class FakeEntryPoint:
    """An entry point of an imaginary installed package."""

    def __init__(self, name: str, component: Callable) -> None:
        self.name, self.component, self.loads = name, component, 0

    def load(self) -> Callable:
        self.loads += 1
        return self.component


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[FakeEntryPoint]]:
    """Return entry points by group, for tests to fill."""
    groups: dict[str, list[FakeEntryPoint]] = {}
    monkeypatch.setattr(registry_module, "entry_points", lambda group: groups.get(group, []))
    return groups


def build_thing() -> str:
    return "thing"


def test_register_and_get() -> None:
    registry = Registry("thing", "some.group")
    assert registry.register("one")(build_thing) is build_thing
    assert registry.names() == ("one",)
    assert registry.get("one") is build_thing


def test_the_same_component_may_register_twice_another_may_not() -> None:
    registry = Registry("thing", "some.group")
    registry.register("one")(build_thing)
    registry.register("one")(build_thing)
    with pytest.raises(ValueError, match=r"thing 'one' is registered already, by .*build_thing"):
        registry.register("one")(lambda: None)
    assert registry.get("one") is build_thing


@pytest.mark.parametrize(
    ("typo", "meant"), [("gruu", "gru"), ("lstn", "lstm"), ("GRU2", "gru"), ("mba_gr", "mamba_gru")]
)
def test_unknown_names_get_a_suggestion(typo: str, meant: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown backbone '{typo}': did you mean '{meant}'") as caught:
        backbones.get(typo)
    assert isinstance(caught.value, ValueError)


def test_no_suggestion_if_no_name_is_near() -> None:
    message = did_you_mean("xyz", ["lstm", "gru"])
    assert "did you mean" not in message
    assert "gru, lstm" in message
    assert "did you mean" not in did_you_mean("xyz", [])
    assert "did you mean" not in did_you_mean("gtrxl", ["gru", "lru"])
    assert did_you_mean("Recall", ["popgym-CountRecallHard-v0", "lru"]) == "did you mean 'popgym-CountRecallHard-v0'?"


def test_a_long_list_of_names_is_shortened_to_the_command_that_lists_all() -> None:
    names = [f"task{number:02}" for number in range(30)]
    shown = "known: task00, task01, task02, task03, task04 and 25 more"
    assert did_you_mean("xyz", names) == shown
    assert did_you_mean("xyz", names, "list-tasks") == f"{shown}; all: list-tasks"


def test_shipped_backbones_are_registered() -> None:
    assert {"gru", "lru", "lstm"} <= set(backbones.names())
    assert backbones.get("gru") is build_gru


def test_entry_points_are_found_and_loaded_once_at_first_use(installed: dict) -> None:
    other, thing = FakeEntryPoint("other", build_gru), FakeEntryPoint("theirs", build_thing)
    installed["some.group"] = [other, thing]
    installed["another.group"] = [FakeEntryPoint("elsewhere", build_thing)]
    registry = Registry("thing", "some.group")
    registry.register("ours")(build_gru)
    assert registry.names() == ("other", "ours", "theirs")
    assert (other.loads, thing.loads) == (0, 0)
    assert registry.get("theirs") is build_thing
    assert registry.get("theirs") is build_thing
    assert (other.loads, thing.loads) == (0, 1)
    with pytest.raises(UnknownNameError, match="did you mean 'theirs'"):
        registry.get("their")


def test_registered_names_win_over_installed_ones(installed: dict) -> None:
    theirs = FakeEntryPoint("one", build_gru)
    installed["some.group"] = [theirs]
    registry = Registry("thing", "some.group")
    registry.register("one")(build_thing)
    assert registry.get("one") is build_thing
    assert theirs.loads == 0
    assert registry.names() == ("one",)


def test_backbones_have_the_documented_group(installed: dict) -> None:
    installed["cyborg_torchrl.backbones"] = [FakeEntryPoint("third_party", build_gru)]
    assert "third_party" in backbones.names()
    installed.clear()
    assert "third_party" not in backbones.names()
