"""`delayed_cue`: see a cue, wait, and name it when asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cyborg_torchrl.envs.memory.task import Judgement, Latents, Level, Memory, MemoryTask, Sizes, four_levels, recall
from cyborg_torchrl.registry import register_environment


@register_environment("delayed_cue")
class DelayedCueEnv(MemoryTask):
    """Delayed cue, as a batch of episodes on one device.

    An episode lasts `horizon + 2` steps: the cue, `horizon` blank steps, the query.

    - Observation, [N, cues + 2] float: the cue as one-hot with the cue flag (second last entry) at the first step;
      all zero while blank; the query flag (last entry) at the last step.
    - Action, [N] integer in [0, cues): the action at the query is the answer; all others are ignored.
    - Reward: +1 for the right answer, -1 for a wrong one, 0 otherwise. The answer terminates the episode.
    - "success", [N, 1] float: 1 if the answer was right.

    Chance is 1 / cues. Only memory helps, since all observations between cue and query are equal.

    Args:
        num_envs: N, number of environments.
        cues: number of different cues, 2 or more; None: the level's.
        horizon: blank steps between cue and query, 0 or more; None: the level's.
        level: easy, medium, hard or extreme; None: 4 cues, 1000 blank steps.
        device: device of all tensors.
        seed: seed of the cues; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range or not an integer, or the level is unknown.
    """

    levels = four_levels((50, 4, 0.95), (200, 8, 0.90), (1000, 8, 0.80), (5000, 16, 0.70))
    default = Level(1000, 4, 0.95)
    cues: int
    measure = "cues"
    least = {"cues": 2, "horizon": 0}
    has_fixed_length = True

    def __init__(self, num_envs: int = 64, *, cues: int | None = None, **shared: Any) -> None:
        super().__init__(num_envs, {"cues": cues}, **shared)
        # One row for each kind of step, so that an observation is one look-up: the cues, a blank step, the query.
        self._shown = torch.zeros(self.cues + 2, self.cues + 2, device=self.device)
        self._shown[: self.cues, : self.cues] = torch.eye(self.cues)
        self._shown[: self.cues, -2] = 1.0
        self._shown[-1, -1] = 1.0

    def sizes(self) -> Sizes:
        """Return the sizes that follow from the options."""
        return Sizes(features=self.cues + 2, actions=self.cues, answers=1, steps=self.horizon + 2)

    def _draw(self) -> Latents:
        return {"cue": self.randint(self.cues)}

    def _show(self, time: Tensor, latents: Latents) -> Tensor:
        kind = torch.where(time == 0, latents["cue"], self.cues)
        return self._shown.index_select(0, kind + (time == self.horizon + 1))

    def _judge(self, action: Tensor, time: Tensor, latents: Latents) -> Judgement:
        is_query = time == self.horizon + 1
        return Judgement(is_query, is_query & (action == latents["cue"]), is_query)

    def _oracle(self, observation: Tensor, memory: Memory) -> Tensor:
        seen = observation[..., : self.cues].argmax(-1)
        cue = torch.where(observation[..., -2] > 0, seen, recall(memory, "cue", torch.zeros_like(seen)))
        memory["cue"] = cue
        return cue
