"""Errors of an environment name environment, seed and step, in this process and in others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch

from cyborg_torchrl.cli.main import main
from cyborg_torchrl.envs.gym.batch import batch
from cyborg_torchrl.envs.gym.failures import failed_place, portable

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install 'cyborg-torchrl[gym]'")


@pytest.fixture(autouse=True)
def sent_by_value() -> Iterator[None]:
    """Workers cannot import this module."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def make_fragile() -> gymnasium.Env:
    """Breaks where the action is 1, and in its second reset."""

    class Stubborn(Exception):
        """An error that cannot be made again from its arguments."""

        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    class Fragile(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)
        action_space = gymnasium.spaces.Discrete(3)
        resets = 0

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[np.ndarray, dict[str, Any]]:
            self.resets += 1
            if self.resets == 2:
                raise OSError("the simulator is gone")
            return np.zeros(1, np.float32), {}

        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            if action == 1:
                raise ZeroDivisionError("a wall of\nno thickness")
            if action == 2:
                raise Stubborn(1, 2)
            return np.zeros(1, np.float32), 0.0, False, False, {}

    return Fragile()


def play(workers: int, actions: list[list[int]]) -> int:
    """Step four environments. Return the seed of environment 2."""
    env = batch(make_fragile, 4, workers=workers, seed=7)
    try:
        carried = env.reset()
        for action in actions:
            carried = env.step(carried.set("action", torch.tensor(action)))["next"]
        env.reset()
    finally:
        env.close()
    raise AssertionError("nothing was raised")


SEED = int(np.random.SeedSequence(7).generate_state(4)[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_step(workers: int) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        play(workers, [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]])
    place = f"environment 2 (seed {SEED}) failed in step 3 of its episode: ZeroDivisionError: a wall of no thickness"
    assert failed_place(caught.value) == place
    text = "".join(caught.value.__notes__) if workers else str(caught.traceback)
    assert "test_failures.py" in text  # the frames of the environment itself


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_reset(workers: int) -> None:
    with pytest.raises(OSError, match="the simulator is gone") as caught:
        play(workers, [[0, 0, 0, 0]])
    assert failed_place(caught.value).startswith("environment 0 (seed ")
    assert failed_place(caught.value).endswith(") failed in its reset: OSError: the simulator is gone")


def test_an_error_that_cannot_be_sent_keeps_its_name_and_place() -> None:
    with pytest.raises(RuntimeError, match=r"Stubborn\('1 and 2'\)") as caught:
        play(2, [[0, 0, 2, 0]])
    assert failed_place(caught.value).endswith("failed in step 1 of its episode: Stubborn: 1 and 2")


def test_other_errors_have_no_place() -> None:
    assert failed_place(ValueError("no")) is None
    assert failed_place(portable(ValueError("no"))) is None


def test_the_command_line_says_it_before_the_traceback(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    gymnasium.register("CyborgTests/Fragile-v0", entry_point=make_fragile)
    options = ["env=gymnasium", "env.id=CyborgTests/Fragile-v0", "env.num_envs=2", "train.n_steps=8", "train.seed=3"]
    options += ["train.num_minibatches=2", f"logger.base_dir={tmp_path}", "logger.progress=false"]
    try:
        with pytest.raises(OSError, match="the simulator is gone"):
            main(["train", *options])
    finally:
        del gymnasium.registry["CyborgTests/Fragile-v0"]
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "error" in line] == [
        "error: environment 0 (seed 0) failed in its reset: OSError: the simulator is gone"
    ]
    assert lines[-1] == "error: environment 0 (seed 0) failed in its reset: OSError: the simulator is gone"
