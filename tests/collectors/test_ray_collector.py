"""Rollouts from workers on a Ray cluster: what they are, and what becomes of workers that die."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase, Transform

from cyborg_torchrl.collectors import RayRolloutCollector, RolloutCollector
from cyborg_torchrl.collectors.ray_cluster import ClusterError, RayCluster
from cyborg_torchrl.collectors.ray_collector import MAX_DEATHS, WorkerError
from cyborg_torchrl.config import load_config
from cyborg_torchrl.data import Rollout
from cyborg_torchrl.envs import make_env
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.modules.nan_check import NonFiniteError
from cyborg_torchrl.training.builders import build_agent

ray = pytest.importorskip("ray")
NUM_ENVS, STEPS, WORKERS, SEED = 3, 40, 2, 7
FRAMES = WORKERS * NUM_ENVS * STEPS
STATES_AT = [0, 13]


class Pause(Transform):
    """Makes a step take its time."""

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        time.sleep(0.02)
        return next_tensordict


def make_marked(folder: Path, seed: int, *, is_slow: bool = False) -> EnvBase:
    """Episodes of 14 steps; the worker's process leaves its id in a file that is called by the seed."""
    env = make_env("delayed_cue", num_envs=NUM_ENVS, horizon=12, seed=seed)
    if is_slow:
        env.append_transform(Pause())
    folder.mkdir(exist_ok=True)
    (folder / f"{seed}.tmp").write_text(str(os.getpid()))
    (folder / f"{seed}.tmp").replace(folder / str(seed))
    return env


class Broken(Transform):
    """Makes the second environment's reward not a number at the sixth step."""

    count = 0

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        self.count += 1
        if self.count == 6:
            next_tensordict["reward"][1] = float("nan")
        return next_tensordict


def make_broken(seed: int) -> EnvBase:
    env = make_env("delayed_cue", num_envs=NUM_ENVS, horizon=12, seed=seed)
    if seed == SEED + 1:
        env.append_transform(Broken())
    return env


def make_nothing(seed: int) -> EnvBase:
    raise ValueError("no such simulator")


def make_dying(seed: int) -> EnvBase:
    os._exit(1)


def state_steps(steps: int) -> list[int]:
    return STATES_AT


@pytest.fixture(autouse=True)
def _workers_know_this_file() -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def agent() -> PPOAgent:
    cfg = load_config(overrides=["backbone=gru", "backbone.hidden_size=16", "env.horizon=12"])
    agent = build_agent(cfg, make_env("delayed_cue", num_envs=NUM_ENVS, horizon=12, seed=0))
    for parameter in agent.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return agent


@pytest.fixture
def build(agent: PPOAgent) -> Iterator[Callable[..., RayRolloutCollector]]:
    """Builder of a collector, from the function that makes environments."""
    built: list[RayRolloutCollector] = []

    def make(maker: Callable[[int], EnvBase], rollouts: int = 2) -> RayRolloutCollector:
        collector = RayRolloutCollector(
            [maker] * WORKERS,
            agent,
            frames_per_batch=FRAMES,
            total_frames=rollouts * FRAMES,
            value_operator=agent.get_value_operator(),
            cluster=RayCluster(num_workers=WORKERS),
            seed=SEED,
            state_steps=state_steps,
        )
        built.append(collector)
        return collector

    yield make
    for collector in built:
        collector.shutdown()


class OneAfterTheOther:
    """What the workers should yield: each one's rollouts in this process, with random numbers of its own."""

    def __init__(self, maker: Callable[[int], EnvBase], agent: PPOAgent) -> None:
        self.parts = []
        for seed in range(SEED, SEED + WORKERS):
            env = maker(seed)
            torch.manual_seed(seed)
            collector = RolloutCollector(
                env, agent, frames_per_batch=FRAMES // WORKERS, total_frames=FRAMES // WORKERS,
                value_operator=agent.get_value_operator(), state_steps=state_steps,
            )  # fmt: skip
            torch.manual_seed(seed)
            collector.set_seed(seed)
            self.parts.append((collector, torch.get_rng_state()))

    def rollout(self) -> list[Rollout]:
        rollouts = []
        for index, (collector, rng) in enumerate(self.parts):
            torch.set_rng_state(rng)
            rollouts.append(collector.rollout())
            self.parts[index] = (collector, torch.get_rng_state())
        return rollouts


def assert_same(rollout: Rollout, parts: list[Rollout]) -> None:
    for name in ("steps", "stored_states"):
        expected = torch.cat([getattr(part, name).contiguous() for part in parts])
        found = getattr(rollout, name)
        assert found.shape == expected.shape
        assert sorted(map(str, found.keys(True, True))) == sorted(map(str, expected.keys(True, True)))
        for key in expected.keys(True, True):
            assert torch.equal(found[key], expected[key]), key


def process_of(folder: Path, seed: int, seconds: float = 60.0) -> int:
    """The process of the worker that has this seed, once it is there."""
    end = time.monotonic() + seconds
    while not (folder / str(seed)).exists():
        assert time.monotonic() < end, f"no worker with seed {seed}"
        time.sleep(0.01)
    return int((folder / str(seed)).read_text())


def is_alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_rollouts_are_those_of_the_workers_one_after_the_other(
    agent: PPOAgent, build: Callable[..., RayRolloutCollector], tmp_path: Path
) -> None:
    """Bit by bit, with parameters that change in between; nothing is left behind."""
    maker = partial(make_marked, tmp_path / "here")
    expected = OneAfterTheOther(maker, agent)
    collector = build(partial(make_marked, tmp_path / "there"))
    for rollout in collector:
        assert rollout.state_steps == tuple(STATES_AT)
        assert_same(rollout, expected.rollout())
        with torch.no_grad():
            for parameter in agent.parameters():
                parameter += 0.05
        collector.update_policy_weights_()
    assert collector.frames == 2 * FRAMES
    processes = [process_of(tmp_path / "there", SEED + index) for index in range(WORKERS)]
    assert all(is_alive(process) for process in processes)
    collector.shutdown()
    end = time.monotonic() + 10
    while any(is_alive(process) for process in processes) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(is_alive(process) for process in processes)


@pytest.mark.slow
def test_a_worker_that_dies_loses_its_unfinished_batch_alone(
    agent: PPOAgent,
    build: Callable[..., RayRolloutCollector],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What the others played stays; the new one begins from the initial memory, in episodes of its own."""
    expected = OneAfterTheOther(partial(make_marked, tmp_path / "here"), agent)
    collector = build(partial(make_marked, tmp_path / "there", is_slow=True))
    first = collector.rollout()
    assert_same(first, expected.rollout())
    victim = process_of(tmp_path / "there", SEED + 1)
    threading.Timer(0.3, os.kill, (victim, signal.SIGKILL)).start()
    second = collector.rollout()
    assert collector.deaths == 1
    assert "worker 1 died" in caplog.text
    assert second.steps.shape == (WORKERS * NUM_ENVS, STEPS)
    survivor = expected.rollout()[0]
    assert_same(Rollout(second.steps[:NUM_ENVS], second.stored_states[:NUM_ENVS], second.state_steps), [survivor])
    new = slice(NUM_ENVS, None)
    assert second.steps["is_init"][new, 0].all()
    assert not second.stored_states["memory_state", "hidden"][new, 0].any()
    cues = [r.steps["observation"][new, 0] for r in (first, second)]
    assert not torch.equal(*cues), "the new worker plays the dead one's episodes again"
    third = collector.rollout()
    assert collector.deaths == 1
    assert third.stored_states["memory_state", "hidden"][new, 0].any(), "memory goes on"
    assert "raylet" not in "".join(capfd.readouterr()), "Ray keeps quiet"


@pytest.mark.slow
def test_workers_that_die_again_and_again_are_replaced_each_time(
    build: Callable[..., RayRolloutCollector], tmp_path: Path
) -> None:
    collector = build(partial(make_marked, tmp_path / "there", is_slow=True), rollouts=4)
    seeds = iter([SEED, SEED + 1, SEED + WORKERS, SEED + WORKERS + 1])  # both, and both that replace them
    rollouts = []
    for number, rollout in enumerate(collector):
        rollouts.append(rollout)
        if number == 2:
            break
        for _ in range(2):
            victim = process_of(tmp_path / "there", next(seeds))
            threading.Timer(0.3, os.kill, (victim, signal.SIGKILL)).start()
    assert collector.deaths == 4
    assert all(rollout.steps.shape == (WORKERS * NUM_ENVS, STEPS) for rollout in rollouts)


@pytest.mark.slow
def test_a_worker_that_dies_over_and_over_ends_the_run(build: Callable[..., RayRolloutCollector]) -> None:
    collector = build(make_dying)
    with pytest.raises(WorkerError, match=rf"worker \d died {MAX_DEATHS + 1} times before it had finished a rollout"):
        collector.rollout()


@pytest.mark.slow
def test_an_environment_that_cannot_be_made_is_named(build: Callable[..., RayRolloutCollector]) -> None:
    collector = build(make_nothing)
    with pytest.raises(WorkerError, match=r"worker \d failed as it began: ValueError: no such simulator"):
        collector.rollout()


@pytest.mark.slow
def test_what_is_not_finite_is_found_among_all_environments(build: Callable[..., RayRolloutCollector]) -> None:
    collector = build(make_broken)
    with pytest.raises(NonFiniteError, match=r"'next/reward' is nan in environment 4 at step 5"):
        collector.rollout()


@pytest.mark.slow
def test_workers_go_on_where_they_stood(
    agent: PPOAgent, build: Callable[..., RayRolloutCollector], tmp_path: Path
) -> None:
    collector = build(partial(make_marked, tmp_path / "one"), rollouts=3)
    collector.rollout()
    state = collector.state_dict()
    assert state is not None
    expected = collector.rollout()
    collector.shutdown()
    again = build(partial(make_marked, tmp_path / "two"))
    assert again.load_state_dict(state) == 0
    assert_same(again.rollout(), [expected])


@pytest.mark.slow
def test_a_cluster_that_is_not_there_or_too_small_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("auto", "127.0.0.1:1"):
        with pytest.raises(ClusterError, match=rf"no Ray cluster at '{address}' \(.*\): start one with 'ray start"):
            RayCluster(address, num_workers=1)
    with pytest.raises(ClusterError, match=r"auto or ip:port, as in 10.0.0.1:6379; got 'ray://here:10001'"):
        RayCluster("ray://here:10001", num_workers=1)
    with pytest.raises(ClusterError, match=r"2 workers with num_gpus=50 each need 100 GPUs; the Ray cluster has \d"):
        RayCluster(num_workers=2, num_gpus=50)
    assert not ray.is_initialized()


def test_without_ray_the_way_to_get_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'cyborg-torchrl\[ray\]'"):
        RayCluster(num_workers=1)
