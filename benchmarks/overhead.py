"""Measure the cost of stored memory states: the same network with and without them, in one process.

python -m benchmarks.overhead --backbones gru mamba_gru --repeats 11

Rollouts are compared with rollouts that store only the first state. Updates are compared with updates of chunks of the
same length from the initial state, which store, gather and replay nothing. Bytes are those of the stored states of
100,000 steps, as the buffer reports them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from tensordict import TensorDict
from torchrl.envs import EnvBase, InitTracker, TransformedEnv

from benchmarks.core_speed import paired
from cyborg_torchrl import keys
from cyborg_torchrl.collectors import RolloutCollector
from cyborg_torchrl.collectors.runtime import prepare_cpu
from cyborg_torchrl.data import EpisodeBuffer, RecurrentRolloutBuffer, Rollout
from cyborg_torchrl.envs import DelayedCueEnv
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder
from cyborg_torchrl.objectives import RecurrentClipPPOLoss, add_advantages
from cyborg_torchrl.registry import backbones
from cyborg_torchrl.training.command import positive

Buffer = RecurrentRolloutBuffer | EpisodeBuffer
NUM_ENVS, STEPS, MINIBATCHES = 64, 128, 8
STRIDE = 1000
FRAMES = NUM_ENVS * STEPS


class Mode(NamedTuple):
    """A recurrent mode and its buffer."""

    name: str
    seq_len: int
    build: Callable[[], Buffer]


def _chunks(seq_len: int, **options: int) -> Buffer:
    batch = NUM_ENVS * STEPS // seq_len // MINIBATCHES
    return RecurrentRolloutBuffer(FRAMES, seq_len, batch, num_envs=NUM_ENVS, **options)


MODES = (
    Mode("burn_in, seq_len 1", 1, lambda: _chunks(1)),
    Mode("tbptt, seq_len 32", 32, lambda: _chunks(32)),
    Mode("burn_in 16, seq_len 32", 32, lambda: _chunks(32, burn_in=16)),
    Mode("seq_len 16, stride 64", 16, lambda: _chunks(16, state_stride=64)),
    Mode("episode", STEPS, lambda: EpisodeBuffer(FRAMES, STEPS, NUM_ENVS // MINIBATCHES, num_envs=NUM_ENVS)),
)


def build_agent(backbone: str, hidden_size: int, env: EnvBase) -> PPOAgent:
    """Build an agent as experiments do."""
    torch.manual_seed(0)
    encoder = build_encoder(env.observation_spec, batch_dims=1, features=64)
    core = backbones.get(backbone)(64, hidden_size=hidden_size)
    return PPOAgent(encoder, Backbone(core), env.action_spec, batch_dims=1)


def collector_of(
    agent: PPOAgent, at: Callable[[int], Sequence[int]] | None, num_envs: int = NUM_ENVS, steps: int = STEPS
) -> RolloutCollector:
    """Build a collector of delayed cue; episodes are as long as rollouts."""
    env = TransformedEnv(DelayedCueEnv(num_envs, horizon=steps - 2, seed=0), InitTracker())
    return RolloutCollector(
        env,
        agent,
        frames_per_batch=num_envs * steps,
        total_frames=num_envs * steps,
        value_operator=agent.get_value_operator(),
        state_steps=at,
    )


def without_states(rollout: Rollout, seq_len: int) -> Rollout:
    """Return the same steps with an episode start at each chunk, so that no state is stored."""
    steps = rollout.steps.clone()
    is_init = steps.get(keys.IS_INIT)
    is_init[:, ::seq_len] = True
    at = tuple(range(0, STEPS, seq_len))
    return Rollout(steps, TensorDict({}, [NUM_ENVS, len(at)]), at)


def sparse_states(agent: PPOAgent, num_envs: int = 8, seq_len: int = 250) -> tuple[float, float]:
    """Return MB for 100,000 steps with a state every `STRIDE` steps, and the largest |log ratio| after replay."""
    frames = 2 * STRIDE * num_envs
    buffer = RecurrentRolloutBuffer(frames, seq_len, num_envs * 4, num_envs=num_envs, state_stride=STRIDE)
    collector = collector_of(agent, buffer.state_steps, num_envs, 2 * STRIDE)
    rollout = collector.rollout()
    add_advantages(rollout.steps, agent.get_value_operator(), gamma=0.99, gae_lambda=0.95)
    buffer.store(rollout, agent)
    loss = RecurrentClipPPOLoss(agent, entropy_bonus=False)
    with torch.no_grad():
        error = max(float(loss(batch)["ratio_error"]) for batch in buffer)
    return buffer.state_bytes() * 100_000 / frames / 1e6, error


def epoch(agent: PPOAgent, buffer: Buffer) -> Callable[[], None]:
    """Take one pass over a buffer with optimiser steps, at a learning rate of zero."""
    loss = RecurrentClipPPOLoss(agent, entropy_bonus=False)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-9)

    def run() -> None:
        for batch in buffer:
            losses = loss(batch)
            optimizer.zero_grad()
            (losses["loss_objective"] + losses["loss_critic"]).backward()
            optimizer.step()

    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables. Return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["gru", "mamba_gru"], choices=backbones.names(),
                        metavar="NAME", help="memories (%(default)s)")  # fmt: skip
    parser.add_argument("--hidden-size", type=positive, default=128, help="their width (%(default)s)")
    parser.add_argument("--repeats", type=positive, default=11, help="pairs of runs a line (%(default)s)")
    arguments = parser.parse_args(argv)
    prepare_cpu(1)
    table = Table("backbone", "mode", title=f"storing states: {NUM_ENVS} environments, {STEPS} steps, one thread")
    for column in (
        "rollout ms",
        "without",
        "ratio",
        "epoch ms",
        "without",
        "ratio",
        "store ms",
        "without",
        "MB / 100k",
    ):
        table.add_column(column, justify="right")
    for name in arguments.backbones:
        agent = build_agent(name, arguments.hidden_size, DelayedCueEnv(NUM_ENVS))
        plain = collector_of(agent, None)
        for mode in MODES:
            buffer, bare = mode.build(), _chunks(mode.seq_len)
            storing = collector_of(agent, buffer.state_steps)
            rollout = storing.rollout()
            add_advantages(rollout.steps, agent.get_value_operator(), gamma=0.99, gae_lambda=0.95)
            buffer.store(rollout, agent)
            bare.store(without_states(rollout, mode.seq_len))
            rolled = paired(storing.rollout, plain.rollout, arguments.repeats)
            updated = paired(epoch(agent, buffer), epoch(agent, bare), arguments.repeats)
            kept, nothing = rollout, without_states(rollout, mode.seq_len)
            stored = paired(partial(buffer.store, kept, agent), partial(bare.store, nothing), arguments.repeats)
            megabytes = buffer.state_bytes() * 100_000 / FRAMES / 1e6
            figures = [f"{value:.2f}" for value in (*rolled, *updated, *stored[:2])]
            table.add_row(name, mode.name, *figures, f"{megabytes:.3f}")
            print(f"timed: {name}, {mode.name}", file=sys.stderr)
        megabytes, error = sparse_states(agent)
        table.add_row(name, f"one state every {STRIDE} steps", *[""] * 8, f"{megabytes:.3f}")
        print(f"{name}: largest |log ratio| of chunks replayed from states {STRIDE} steps apart: {error:.1e}")
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
