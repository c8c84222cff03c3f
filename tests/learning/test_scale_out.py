"""Training on a Ray cluster of two nodes, each with processes of its own, on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from cyborg_torchrl.collectors import RolloutCollector
from cyborg_torchrl.config import load_config
from cyborg_torchrl.data import Rollout
from cyborg_torchrl.training.builders import Training, build_env, build_trainer
from cyborg_torchrl.training.experiment import run_experiment

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
WORKERS = 2
SHORT = ["env.horizon=20", "env.num_envs=32", "logger=quiet", "train.total_timesteps=20000"]


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    nodes = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=nodes)
    cluster.add_node(**nodes)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def on_ray(cluster: Any, *overrides: str) -> DictConfig:
    place = ["collector=ray", f"collector.address={cluster.address}", f"collector.num_workers={WORKERS}"]
    return load_config(overrides=[*SHORT, *place, *overrides])


def success(metrics: Sequence[Mapping[str, float]]) -> float:
    """Of the last eight updates, of 32 episodes each: one process alone has .92 to .98, of single updates .69 to 1."""
    return mean(metric["success_rate"] for metric in metrics[-8:])


class OneAfterTheOther:
    """The workers' rollouts in this process, each with random numbers of its own."""

    def __init__(self, cfg: DictConfig, training: Training) -> None:
        old = training.trainer.collector
        frames, here = old.frames_per_batch // WORKERS, torch.get_rng_state()
        self.parts, self.count = [], old.total_frames // old.frames_per_batch
        for seed in range(cfg.train.seed, cfg.train.seed + WORKERS):
            env = build_env(cfg, num_envs=cfg.env.num_envs // WORKERS, seed=seed)
            torch.manual_seed(seed)
            collector = RolloutCollector(
                env, training.agent, frames_per_batch=frames, total_frames=frames,
                value_operator=training.agent.get_value_operator(),
                state_steps=training.trainer.buffer.state_steps,
            )  # fmt: skip
            torch.manual_seed(seed)
            collector.set_seed(seed)
            self.parts.append((collector, torch.get_rng_state()))
        torch.set_rng_state(here)

    def __iter__(self) -> Iterator[Rollout]:
        for _ in range(self.count):
            here, rollouts = torch.get_rng_state(), []
            for index, (collector, rng) in enumerate(self.parts):
                torch.set_rng_state(rng)
                rollouts.append(collector.rollout())
                self.parts[index] = (collector, torch.get_rng_state())
            torch.set_rng_state(here)
            steps, stored_states = (
                torch.cat([getattr(r, name) for r in rollouts]) for name in ("steps", "stored_states")
            )
            yield Rollout(steps, stored_states, rollouts[0].state_steps)


def test_training_has_the_figures_of_one_process(cluster: Any) -> None:
    """The same seeds and as many environments for each: every metric of every update, bit by bit."""
    cfg = on_ray(cluster, "train.seed=1")
    there = build_trainer(cfg)
    workers = there.trainer.collector._workers
    nodes = ray.get([w.__ray_call__.remote(lambda worker: ray.get_runtime_context().get_node_id()) for w in workers])
    assert len(set(nodes)) == 2, "each node has a worker"
    found = list(there.trainer.run())
    there.trainer.close()
    here = build_trainer(load_config(overrides=[*SHORT, "train.seed=1"]))
    here.trainer.collector = OneAfterTheOther(cfg, here)
    assert found == list(here.trainer.run())
    assert len(found) > 20
    assert success(found) > 0.9


def test_training_goes_on_when_a_node_is_lost(cluster: Any, tmp_path) -> None:
    cfg = on_ray(cluster, f"logger.base_dir={tmp_path}")
    training = build_trainer(cfg)
    metrics = []
    for metric in training.trainer.run():
        metrics.append(metric)
        if len(metrics) == 3:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    # another worker may have begun on the node before the cluster knew that it was gone
    assert 1 <= training.trainer.collector.deaths <= 2
    training.trainer.close()
    assert len(metrics) == training.trainer.total_updates
    assert success(metrics) > 0.9


def test_a_run_is_a_run(cluster: Any, tmp_path) -> None:
    """With a folder, an evaluation, and a resumption that ends as the run that went through."""
    at = [f"logger.base_dir={tmp_path}", "train.lr_schedule=constant", "train.total_timesteps=6000"]
    through = run_experiment(on_ray(cluster, *at, "logger.run_name=through"))
    run_experiment(on_ray(cluster, *at, "logger.run_name=cut", "train.total_timesteps=3000"))
    resumed = run_experiment(on_ray(cluster, *at, f"logger.resume={tmp_path / 'cut'}"))
    assert resumed["total_updates"] == through["total_updates"]
    assert resumed["mean_reward"] == through["mean_reward"]
    assert resumed["train_success_rate"] == through["train_success_rate"]


def processes_with(marker: str) -> list[str]:
    """Command lines of the processes that have it in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # gone meanwhile, or somebody else's
            continue
    return found


def test_an_interrupt_ends_the_run_its_workers_and_its_cluster(tmp_path: Path) -> None:
    """As Ctrl-C, which every process of the terminal's group gets."""
    marker = uuid.uuid4().hex
    options = ["collector=ray", "env.horizon=200", "train.total_timesteps=9999999", "logger.progress=false"]
    where = [f"logger.base_dir={tmp_path}", "logger.run_name=run"]
    running = subprocess.Popen(
        [sys.executable, "-m", "cyborg_torchrl", "train", *options, *where],
        env={**os.environ, "CYBORG_TEST_MARKER": marker},
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "last.pt").exists():
        assert running.poll() is None
        assert time.monotonic() < end
        time.sleep(0.2)
    assert len(processes_with(marker)) > 3, "workers and the cluster's own"
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=60)
    lines = [line for line in said.splitlines() if line.strip()]
    assert lines == [line for line in lines if "goes on from the last checkpoint" in line]
    assert len(lines) == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["is_interrupted"]
    end = time.monotonic() + 20
    while left := processes_with(marker):
        assert time.monotonic() < end, left
        time.sleep(0.5)
