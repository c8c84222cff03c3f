"""One episode of a trained agent, with what its memory held at each step and where its slots were read and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl import keys
from cyborg_torchrl.checks import Report, check_recurrent
from cyborg_torchrl.cores import Core, PMMCore, State
from cyborg_torchrl.cores.pmm import Addressing
from cyborg_torchrl.envs.make import episode_attribute
from cyborg_torchrl.envs.transforms.normalization import freeze_statistics
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.training.builders import build_env
from cyborg_torchrl.training.experiment import EVALUATION_SEED_OFFSET

Array = NDArray[np.float32]
MAX_STEPS = 2000
"""Steps of an episode that are looked at."""
MAX_CHUNK = 256
"""Steps over which the gradient horizon is measured."""
NUM_ENVS = 4


class Slots(NamedTuple):
    """Where an external memory was read and written."""

    read: Array
    """[T, R, S], which sum to one over the slots."""
    write: Array
    """[T, S]."""
    usage: Array
    """After the step, [T, S]."""


@dataclass(frozen=True)
class Episode:
    """One episode, step by step."""

    states: dict[str, Array]
    """Each entry of the memory state after each step, [T, *shape]."""
    reward: Array
    """[T]."""
    is_whole: bool
    """Whether it ended by itself."""
    success: float | None
    slots: list[Slots]
    """Of each external memory, from the first layer on."""


class RecordedMemory(Core):
    """An external memory that notes where each step reads and writes.

    Args:
        core: the memory.
    """

    def __init__(self, core: PMMCore) -> None:
        super().__init__()
        self.core = core
        self.in_features, self.out_features = core.in_features, core.out_features
        self.state_shapes = core.state_shapes
        self.notes: list[tuple[Addressing, Tensor]] = []

    def initial_state(self, batch: int) -> State:
        """As the memory's."""
        return self.core.initial_state(batch)

    def step(self, x: Float[Tensor, "B F"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """As the memory's, and noted."""
        y, following = self.core.step(x, state)
        self.notes.append((self.core.addressing(x, state), following["usage"]))
        return y, following

    def forward(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """As the memory's."""
        return self.core(x, state, is_init)

    def slots(self) -> Slots:
        """What was noted of the first row."""
        read = torch.stack([note.read[0] for note, _ in self.notes])
        write = torch.stack([note.write[0] for note, _ in self.notes])
        return Slots(read.numpy(), write.numpy(), torch.stack([usage[0] for _, usage in self.notes]).numpy())


@torch.no_grad()
def record_episode(cfg: DictConfig, agent: PPOAgent) -> Episode:
    """Plays one episode as evaluation does. The agent's external memories stay wrapped.

    Raises:
        ConfigError: if the environment cannot be built.
    """
    memories = _wrap_memories(agent)
    env = _primed_env(cfg, agent, 1)
    is_greedy = cfg.logger.eval_actions == "greedy"
    mode = ExplorationType.DETERMINISTIC if is_greedy else ExplorationType.RANDOM
    states: dict[str, list[Tensor]] = {name: [] for name in agent.backbone.state_keys}
    rewards: list[float] = []
    is_done, success = False, None
    try:
        with set_exploration_type(mode), set_recurrent_mode(False):
            tensordict = env.reset()
            while not is_done and len(rewards) < MAX_STEPS:
                played, tensordict = env.step_and_maybe_reset(agent(tensordict))
                after = played.get(keys.NEXT)
                for name, key in agent.backbone.state_keys.items():
                    states[name].append(after.get(key)[0].clone())
                rewards.append(float(after.get(keys.REWARD).reshape(-1)[0]))
                is_done = bool(after.get(keys.DONE).reshape(-1)[0])
                success = after.get(keys.SUCCESS, None)
    finally:
        env.close()
    return Episode(
        {name: torch.stack(values).float().cpu().numpy() for name, values in states.items()},
        np.array(rewards, dtype=np.float32),
        is_done,
        None if success is None else float(success.reshape(-1)[0]),
        [memory.slots() for memory in memories],
    )


def check_agent(cfg: DictConfig, agent: PPOAgent, on_progress: Callable[[str], None]) -> Report:
    """Every check of `check_recurrent`, with a gradient horizon as long as an episode where that is not too long.

    Calls `on_progress` with the name of each check.

    Raises:
        ConfigError: if the environment cannot be built.
        ValueError: if the policy has no memory or cannot be checked.
    """
    env = _primed_env(cfg, agent, NUM_ENVS)
    chunk = max(4, min(episode_attribute(env, "max_episode_steps") or MAX_CHUNK, MAX_CHUNK))
    try:
        return check_recurrent(
            agent,
            env,
            steps=2 * chunk,
            chunk_lengths=(chunk,),
            seed=cfg.train.seed,
            on_progress=lambda name, _: on_progress(name),
        )
    finally:
        env.close()


def _primed_env(cfg: DictConfig, agent: PPOAgent, num_envs: int) -> EnvBase:
    workers = 0 if "workers" in cfg.env else None
    env = build_env(cfg, num_envs=num_envs, seed=cfg.train.seed + EVALUATION_SEED_OFFSET, workers=workers)
    freeze_statistics(env, agent.env_statistics)
    if agent.backbone.state_keys:
        env.append_transform(agent.backbone.make_tensordict_primer())
    return env


def _wrap_memories(agent: PPOAgent) -> list[RecordedMemory]:
    """Puts a recorder around each external memory of an agent, in the order of its layers."""
    found: list[RecordedMemory] = []
    for module in list(agent.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, PMMCore) and not isinstance(module, RecordedMemory):
                nn.Module.add_module(module, name, RecordedMemory(child))
                found.append(module.get_submodule(name))
    return found
