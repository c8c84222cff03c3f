"""Environment processes that die: others take their place, and nothing is lost or counted twice."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
import pytest
import torch

from cyborg_torchrl.config import load_config
from cyborg_torchrl.envs.gym.batch import batch
from cyborg_torchrl.envs.gym.environment import wrap
from cyborg_torchrl.envs.gym.processes import EnvironmentProcesses
from cyborg_torchrl.registry import UnavailableError
from cyborg_torchrl.training.checkpoint import load_checkpoint
from cyborg_torchrl.training.experiment import run_experiment

ROOT = Path(__file__).resolve().parents[3]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # other processes do not find the tests
pytestmark = pytest.mark.filterwarnings("ignore:.*forkserver.*:DeprecationWarning")


class Counter(gymnasium.Env[Any, Any]):
    """Shows how many steps were taken; ends after nine. Breaks at the action 1, kills its process at the action 2."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps, self.mark = 0, self.np_random.random()
        return np.array([self.steps, self.mark]), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if action == 1:
            raise ArithmeticError("this environment is broken")
        if action == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        self.steps += 1
        return np.array([self.steps, self.mark]), 1.0, self.steps == 9, False, {}


class Clock(Counter):
    """Another one each time."""

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        observation, info = super().reset(**options)
        self.mark = observation[1] = time.time_ns() % 10**9
        return observation, info


def make_counter() -> gymnasium.Env:
    return wrap(Counter())


def make_clock() -> gymnasium.Env:
    return wrap(Clock())


def kill(processes: EnvironmentProcesses, worker: int) -> None:
    os.kill(processes.pids[worker], signal.SIGKILL)
    processes._workers[worker].process.join()


@pytest.fixture
def acting() -> Any:
    """An environment by its maker, and a step of it."""
    made = []

    def make(maker: Any, workers: int = 2):
        env = batch(maker, 4, workers=workers, max_episode_steps=9, seed=0)
        made.append(env)
        return env

    yield make
    for env in made:
        env.close()


def test_after_a_death_the_episodes_go_on_where_they_were(acting, caplog) -> None:
    env, alone = acting(make_counter), acting(make_counter, 0)
    carried, expected = env.reset(), alone.reset()
    noop = torch.zeros(4, dtype=torch.long)
    with caplog.at_level(logging.WARNING):
        for t in range(25):
            if t in (0, 4, 5, 9, 18):
                kill(env.games.runner, t % 2)
            played, carried = env.step_and_maybe_reset(carried.set("action", noop))
            same, expected = alone.step_and_maybe_reset(expected.set("action", noop))
            for key in ("observation", "reward", "terminated", "truncated"):
                assert torch.equal(played["next", key], same["next", key])
            assert torch.equal(carried["observation"], expected["observation"])
    assert sum("a new one replaces it" in record.message for record in caplog.records) == 5


def test_what_seed_and_actions_do_not_decide_is_cut_off(acting) -> None:
    """In the process that died alone; with the last observation, no reward, and the next episode after it."""
    env = acting(make_clock)
    noop = torch.zeros(4, dtype=torch.long)
    carried = env.reset()
    for _ in range(3):
        _, carried = env.step_and_maybe_reset(carried.set("action", noop))
    before = carried["observation"].clone()
    kill(env.games.runner, 0)
    played, carried = env.step_and_maybe_reset(carried.set("action", noop))
    after = played["next"]
    assert after["truncated"].squeeze(-1).tolist() == [True, True, False, False]
    assert not after["terminated"].any()
    assert after["reward"].squeeze(-1).tolist() == [0.0, 0.0, 1.0, 1.0]
    assert torch.equal(after["observation"][:2], before[:2])
    assert carried["observation"][:, 0].tolist() == [0.0, 0.0, 4.0, 4.0]
    played, carried = env.step_and_maybe_reset(carried.set("action", noop))
    assert not played["next", "truncated"].any()
    assert carried["observation"][:, 0].tolist() == [1.0, 1.0, 5.0, 5.0]


def test_errors_of_an_environment_are_raised_where_it_was_stepped(acting) -> None:
    env = acting(make_counter)
    with pytest.raises(ArithmeticError, match="this environment is broken"):
        env.step(env.reset().set("action", torch.tensor([0, 0, 0, 1])))


def test_one_that_dies_over_and_over_ends_the_run(acting) -> None:
    env = acting(make_counter)
    with pytest.raises(RuntimeError, match=r"environments 2 to 3 died 5 times over the same request \('step', exit"):
        env.step(env.reset().set("action", torch.tensor([0, 0, 0, 2])))


def test_training_does_not_notice_twenty_deaths(tmp_path, monkeypatch) -> None:
    """The parameters are those of a run in which nobody died, bit for bit, and so are the steps."""
    options = ["env=gymnasium", "id=CartPole-v1", "env.num_envs=4", "env.workers=2", "train.n_steps=30", "logger=quiet"]
    options += [
        "train.total_timesteps=600",
        "train.n_epochs=1",
        "train.num_minibatches=2",
        f"logger.base_dir={tmp_path}",
    ]
    options += ["backbone=gru", "logger.eval_episodes=0"]
    untouched = run_experiment(load_config(overrides=[*options, "logger.run_name=untouched"]))
    step, deaths, chance, lock = EnvironmentProcesses.step, [], random.Random(time.time_ns()), threading.Lock()

    def dangerous(processes: EnvironmentProcesses, actions: Any) -> Any:
        if len(deaths) < 20 and chance.random() < 0.3:
            with lock:
                pid = processes.pids[chance.randrange(len(processes.pids))]
            if chance.random() < 0.5:
                _kill_if_there(pid, deaths)
            else:  # while it steps, or after
                threading.Timer(chance.random() * 1e-3, _kill_if_there, [pid, deaths]).start()
        return step(processes, actions)

    monkeypatch.setattr(EnvironmentProcesses, "step", dangerous)
    killed = run_experiment(load_config(overrides=[*options, "logger.run_name=killed"]))
    assert len(deaths) >= 20
    assert killed["total_timesteps"] == untouched["total_timesteps"] == 600
    one, other = (
        load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["agent"] for name in ("untouched", "killed")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def _kill_if_there(pid: int, deaths: list[int]) -> None:
    with contextlib.suppress(ProcessLookupError):  # another one has come before
        os.kill(pid, signal.SIGKILL)
        deaths.append(pid)


def test_no_process_outlives_the_one_that_collects() -> None:
    code = "import time; from cyborg_torchrl.envs.gym.environment import build_gymnasium; env = build_gymnasium("
    code += "num_envs=2, workers=2); print(*env.games.runner.pids, flush=True); time.sleep(100)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as run:
        assert run.stdout is not None
        pids = [int(pid) for pid in run.stdout.readline().split()]
        run.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(_is_running(pid) for pid in pids):
        time.sleep(0.05)
    assert not any(_is_running(pid) for pid in pids)


def _is_running(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_a_process_that_cannot_be_started_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr("multiprocessing.context.ForkServerProcess.start", refuse)
    with pytest.raises(UnavailableError, match=r"cannot start a process .*: TMPDIR is too long for a socket\.$"):
        EnvironmentProcesses([Counter, Counter], 2, [])
