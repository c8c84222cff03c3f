"""The program of each process of test_distributed.py: all updates on its share of the same rollout.

The first process also trains alone, on the whole rollout. The order of the environments gives it the
minibatches of the two processes together.

    python rank_program.py folder
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDictBase
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement

from cyborg_torchrl import keys
from cyborg_torchrl.collectors import RolloutCollector
from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.data import Rollout
from cyborg_torchrl.envs.transforms.normalization import RunningMoments
from cyborg_torchrl.training.builders import (
    build_agent,
    build_buffer,
    build_env,
    build_loss,
    rollout_length,
)
from cyborg_torchrl.training.distributed import Ranks, joined_ranks, share_of_rank
from cyborg_torchrl.training.trainer import PPOTrainer

NUM_ENVS = 8
TIMEOUT = timedelta(seconds=1)
COMMON = [
    "env.horizon=6",
    f"env.num_envs={NUM_ENVS}",
    "train.n_steps=18",
    "train.n_epochs=2",
    "train.num_minibatches=4",
    "train.total_timesteps=100000",
    "train.gae_lambda=0.9",
    "train.ent_coef=0.01",
]
WHOLE = {"recurrent_mode": "burn_in"}  # one sequence for each environment
CHUNKS = {"recurrent_mode": "tbptt", "seq_len": 6}
MASKED = {"recurrent_mode": "burn_in", "burn_in": 3, "seq_len": 5}
CASES: dict[str, dict[str, Any]] = {
    "whole": WHOLE,
    "whole, float64": WHOLE,
    "chunks": CHUNKS,
    "burn-in, masked, float64": MASKED,
    "no memory": {"recurrent_mode": "none"},
    "minibatch": {**WHOLE, "normalize_advantage": "minibatch"},
    "minibatch, masked": {**MASKED, "normalize_advantage": "minibatch"},
    "step": {**WHOLE, "normalize_advantage": "step"},
    "stopped": {**WHOLE, "target_kl": 1e-5, "n_epochs": 4},
}


@cache
def composed(backbone: str) -> DictConfig:
    return load_config(overrides=[*COMMON, f"backbone={backbone}"])


def config_of(name: str) -> DictConfig:
    cfg = copy.deepcopy(composed("lru" if "float64" in name else "gru"))
    cfg.train.update(CASES[name])
    return cfg


def run(name: str, ranks: Ranks) -> dict[str, Any]:
    """Run two updates of a case. Return the parameters and metrics."""
    whole = config_of(name)
    torch.manual_seed(1)
    agent = build_agent(whole, build_env(whole))
    rollouts = [cast(rollout, "float64" in name) for rollout in collect(whole, agent)]
    agent = agent.double() if "float64" in name else agent
    trainer = build(share_of_rank(whole, ranks), agent, ranks)
    metrics = [trainer.update(share_of(rollout, ranks)) for rollout in rollouts]
    return {"parameters": [p.detach().clone() for p in agent.parameters()], "metrics": metrics}


def build(cfg: DictConfig, agent: Any, ranks: Ranks) -> PPOTrainer:
    """Build a trainer whose buffer yields its rows in the order in which they were stored."""
    env = build_env(cfg)
    buffer = build_buffer(cfg, env, rollout_length(cfg, env))
    buffer.set_sampler(SamplerWithoutReplacement(shuffle=False))
    if ranks.rank:
        with torch.no_grad():  # the first rank's parameters must replace these
            for parameter in agent.parameters():
                parameter += 1.0
    loss = build_loss(cfg, agent)
    config = OmegaConf.to_object(cfg.train)
    return PPOTrainer([], loss, agent.get_value_operator(), buffer, config, ranks=ranks)


def collect(cfg: DictConfig, agent: Any) -> list[Rollout]:
    """Return two rollouts of all environments, the same in every process."""
    env = build_env(cfg)
    steps = rollout_length(cfg, env)
    frames = NUM_ENVS * steps
    collector = RolloutCollector(
        env, agent, frames_per_batch=frames, total_frames=2 * frames, value_operator=agent.get_value_operator(),
        state_steps=build_buffer(cfg, env, steps).state_steps,
    )  # fmt: skip
    collector.set_seed(3)
    return list(collector)


def cast(rollout: Rollout, is_double: bool) -> Rollout:
    def doubled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.double() if is_double and tensor.is_floating_point() else tensor

    return Rollout(rollout.steps.apply(doubled), rollout.stored_states.contiguous().apply(doubled), rollout.state_steps)


def share_of(rollout: Rollout, ranks: Ranks) -> Rollout:
    """Return a rank's environments; for one process alone, the first of each rank, the second of each, and so on."""
    half = NUM_ENVS // 2
    alternating = torch.arange(NUM_ENVS).view(2, half)
    index = alternating[ranks.rank] if ranks.size == 2 else alternating.T.reshape(-1)
    return Rollout(rollout.steps[index], rollout.stored_states[index], rollout.state_steps)


def run_unequal(ranks: Ranks, *, is_double: bool) -> list[torch.Tensor]:
    """Train on minibatches that the ranks share unequally: 6 and 2 sequences, then 8 and none."""
    cfg = config_of("chunks")
    torch.manual_seed(1)
    agent = build_agent(cfg, build_env(cfg))
    rollout = cast(collect(cfg, agent)[0], is_double)
    trainer = build(cfg, agent.double() if is_double else agent, ranks)
    whole = Ranks()  # the advantages of the whole rollout, on each rank
    before, trainer.ranks = trainer.ranks, whole
    trainer._prepare(rollout)
    trainer.ranks = before
    sequences = next(iter(sized(trainer.buffer, 8)))
    for cut in (6, 8):
        parts = (sequences[:cut], sequences[cut:])
        part = sequences if ranks.size == 1 else parts[ranks.rank]
        trainer.step(part if len(part) else None)
    assert trainer.step(None) == {}, "no rank has a minibatch left"
    return [p.detach().clone() for p in agent.parameters()]


def sized(buffer: Any, rows: int) -> Iterator[TensorDictBase]:
    sequences = torch.cat(list(buffer))
    assert keys.TRAIN_MASK not in sequences.keys(True)
    yield sequences[:rows]


def run_moments(ranks: Ranks) -> list[torch.Tensor]:
    """Return moments of numbers that the ranks see separately and merge twice, with a reload in between."""
    numbers = 3.0 + 2.0 * torch.randn(5, 100, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = RunningMoments((4,))
    for index, seen in enumerate(numbers):
        moments.update(seen if ranks.size == 1 else seen[:30] if ranks.rank == 0 else seen[30:])
        if index in (0, 3):
            moments.merge(ranks.sum)
            moments.load_state_dict(moments.state_dict())
    moments.merge(ranks.sum)
    return [moments.count, moments.mean, moments.var]


def wait_for_the_first(ranks: Ranks) -> str:
    """Return the first rank's object, for which the others wait longer than the timeout of other operations."""
    dist.distributed_c10d._set_pg_timeout(TIMEOUT, dist.group.WORLD)

    def make() -> str:
        time.sleep(2 * TIMEOUT.total_seconds())
        return "late"

    return ranks.from_first(make)


def error_of_the_first(ranks: Ranks) -> str:
    """Return the error that the first rank meets."""

    def fail() -> None:
        raise ConfigError(f"rank {ranks.rank} has failed")

    try:
        ranks.from_first(fail)
    except ConfigError as error:
        return str(error)
    return "no error"


def run_all(ranks: Ranks) -> dict[str, Any]:
    return {
        **{name: run(name, ranks) for name in CASES},
        "unequal": {f"float{bits}": run_unequal(ranks, is_double=bits == 64) for bits in (32, 64)},
        "moments": run_moments(ranks),
        "from_first": ranks.from_first(lambda: {"rank": ranks.rank}),
        "error": error_of_the_first(ranks),
        "gather_objects": ranks.gather_objects(ranks.rank),
    }


def main(folder: Path) -> None:
    """Write a rank's results into a file; the first rank also writes those of one process alone."""
    torch.set_num_threads(1)
    with joined_ranks("cpu") as ranks:
        if ranks.is_first:
            torch.save(run_all(Ranks()), folder / "alone.pt")
        results = {**run_all(ranks), "late": wait_for_the_first(ranks)}
        torch.save(results, folder / f"{ranks.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
