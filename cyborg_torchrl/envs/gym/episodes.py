"""A batch of gymnasium environments whose episodes can be replayed after a crash or in another process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from cyborg_torchrl.envs.gym.episode import Episode
from cyborg_torchrl.envs.gym.processes import EnvironmentProcesses, InThisProcess, Stepped


class EpisodeBatch:
    """Environments stepped together; each is reset only on request, and each episode has its seed.

    A seed given by `reseed` takes effect at each environment's next reset, so the caller may still act on the present
    observations. A collector may give the same seed again after its first reset. Then the seed is not used a second
    time, and no episode is played twice. The seeds of all environments are unrelated. With gymnasium's `seed + i`, two
    batches with neighbouring seeds would share most episodes.

    Args:
        makers: one callable for each environment.
        workers: number of worker processes, which are replaced when they die; 0: all environments in this process.
    """

    def __init__(self, makers: Sequence[Callable[[], gymnasium.Env]], workers: int = 0) -> None:
        self.num_envs = len(makers)
        streams = np.random.SeedSequence().generate_state(self.num_envs)
        self.episodes = [Episode(int(word)) for word in streams]
        self._next: list[int | None] = [int(word) for word in streams]
        self.runner: EnvironmentProcesses | InThisProcess
        if workers:
            self.runner = EnvironmentProcesses(makers, workers, self.episodes)
        else:
            self.runner = InThisProcess(dict(enumerate(makers)))
        self.observation_space, self.action_space, self.metadata = self.runner.spaces()

    @property
    def envs(self) -> list[gymnasium.Env]:
        """The environments in this process; empty with worker processes."""
        return list(self.runner.envs.values())

    @property
    def observations(self) -> list[Any]:
        """The present observation of each environment."""
        return [episode.observation for episode in self.episodes]

    def reseed(self, seed: int) -> None:
        """Seed each environment at its next reset."""
        self._next = [int(word) for word in np.random.SeedSequence(seed).generate_state(self.num_envs)]

    def begin(self, chosen: Iterable[int]) -> None:
        """Begin an episode in each of the chosen environments."""
        seeds: dict[int, int] = {}
        for i in chosen:
            self.episodes[i].begin(self._next[i])
            self._next[i] = None
            seeds[i] = self.episodes[i].seed
        for i, (observation, _) in self.runner.reset(seeds, None).items():
            self.episodes[i].observation = observation

    def step(self, actions: Sequence[Any]) -> list[Stepped]:
        """Take a step in each environment, and return what each has returned."""
        stepped = self.runner.step(dict(enumerate(actions)))
        for i, episode in enumerate(self.episodes):
            if not episode.actions and episode.number == 0 and self._next[i] == episode.stream:
                self._next[i] = None  # this episode already used the seed
            episode.observation = stepped[i][0]
            episode.actions.append(actions[i])
        return [stepped[i] for i in range(self.num_envs)]

    def get_state(self) -> dict[str, Any]:
        """Return the present episodes as tensors, numbers and texts."""
        return {
            "streams": [episode.stream for episode in self.episodes],
            "numbers": [episode.number for episode in self.episodes],
            "next": list(self._next),
            "actions": [_as_tensor(episode.actions) for episode in self.episodes],
            "fingerprints": [episode.fingerprint if episode.has_begun else "" for episode in self.episodes],
        }

    def set_state(self, state: Mapping[str, Any]) -> Tensor:
        """Replay the episodes of a state up to their last step.

        Returns:
            [N] bool, true for environments that reached another observation: seed and actions do not determine them.

        Raises:
            ValueError: if the state has another number of environments.
        """
        if len(state["streams"]) != self.num_envs:
            raise ValueError(f"the state is for {len(state['streams'])} environments; this batch has {self.num_envs}.")
        for i, episode in enumerate(self.episodes):
            episode.stream, episode.number = state["streams"][i], state["numbers"][i]
            episode.actions = [] if state["actions"][i] is None else list(state["actions"][i].numpy())
        self._next = list(state["next"])
        running = [i for i, episode in enumerate(self.episodes) if episode.has_begun]
        for i, observation in self.runner.replay({i: self.episodes[i].script for i in running}).items():
            self.episodes[i].observation = observation
        lost = torch.zeros(self.num_envs, dtype=torch.bool)
        for i in running:
            lost[i] = self.episodes[i].fingerprint != state["fingerprints"][i]
        return lost

    def close(self) -> None:
        """Close the environments."""
        self.runner.close()


def _as_tensor(actions: Sequence[Any]) -> Tensor | None:
    return torch.as_tensor(np.stack(actions)) if actions else None
