"""`endless_tmaze`: walk down one corridor after another, and turn to the side shown at the start of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cyborg_torchrl.envs.memory.rewriting import RewritingTask
from cyborg_torchrl.envs.memory.task import Latents, Memory, Sizes, at, four_levels, recall
from cyborg_torchrl.registry import register_environment

FORWARD, LEFT, RIGHT = range(3)
STEPS_PER_CELL = 6
"""Steps that an episode may take for each cell of its corridors."""


@register_environment("endless_tmaze")
class EndlessTMazeEnv(RewritingTask):
    """Endless T-maze, as a batch of episodes on one device.

    An episode is a row of corridors. At the start of each corridor the agent sees to which side it must turn at the
    end. The right turn leads to the next corridor, whose cue replaces the last one. A wrong turn or a step forward at
    the end of a corridor ends the episode. So do the last right turn and the time limit.

    - Observation, [N, 3] float: the cue at the start of a corridor (left: entry 0, right: entry 1), and the position
      divided by the length of the longest corridor (entry 2).
    - Action, [N] integer: 0 forward, 1 left, 2 right. Before the end of a corridor a turn changes nothing.
    - Reward: +1 for a right turn at the end, -1 for another action there, -0.01 for each other step.
    - "success", [N, 1] float: 1 if the agent passed all corridors.

    With random lengths the agent does not see where a corridor ends. It has to try the turn at each position, and to
    remember that it did.

    Chance is 2 ** -corridors.

    Args:
        num_envs: N, number of environments.
        corridors: number of corridors, 1 or more; None: the level's.
        random_lengths: draw the length of each corridor from 1 to `horizon`; otherwise all have `horizon` steps.
        horizon: length of the longest corridor, 1 or more; None: the level's.
        level: easy (the default), medium, hard or extreme. These levels are ours.
        device: device of all tensors.
        seed: seed of the episodes; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range or not an integer, or the level is unknown.

    Source: Shchendrigin et al. (2026), arXiv 2601.15086: corridors, cues, fixed and uniform lengths, the entries of an
    observation, rewards of +1, -1 and -0.01. Known only from code that an author published before the paper: a wrong
    turn ends the episode, the divisor of the position, the time limit. Unlike that code, steps forward cost 0.01 too,
    as summaries of the paper say. We could not read the whole paper, so results need not be comparable.
    """

    levels = four_levels((10, 3, 0.95), (30, 5, 0.95), (100, 10, 0.95), (300, 20, 0.95))
    default = levels["easy"]
    corridors: int
    measure = "corridors"
    least = {"corridors": 1, "horizon": 1}

    def __init__(
        self, num_envs: int = 64, *, corridors: int | None = None, random_lengths: bool = False, **shared: Any
    ) -> None:
        super().__init__(num_envs, {"corridors": corridors}, **shared)
        self.random_lengths = random_lengths

    def sizes(self) -> Sizes:
        """Return the sizes that follow from the options."""
        steps = STEPS_PER_CELL * (self.horizon + 1) * self.corridors
        return Sizes(features=3, actions=3, answers=self.corridors, steps=steps)

    def _draw(self) -> Latents:
        zero = torch.zeros_like(self._time)
        length = self.randint(self.horizon, self.corridors) + 1
        return {
            "cue": self.randint(2, self.corridors),  # 0 left, 1 right
            "length": length if self.random_lengths else torch.full_like(length, self.horizon),
            "corridor": zero,
            "x": zero,
        }

    def _show(self, time: Tensor, latents: Latents) -> Tensor:
        corridor, x = latents["corridor"], latents["x"]
        cue, is_start = at(latents["cue"], corridor), (x == 0) & (corridor < self.corridors)
        return torch.stack([is_start & (cue == 0), is_start & (cue == 1), x / self.horizon], -1).float()

    def _act(self, action: Tensor, time: Tensor, latents: Latents) -> tuple[Tensor, Tensor]:
        corridor, x = latents["corridor"], latents["x"]
        is_end = x == at(latents["length"], corridor)
        is_right = is_end & (action == at(latents["cue"], corridor) + LEFT)
        is_walking = ~is_end & (action == FORWARD)
        latents["x"] = (x + is_walking.long()).masked_fill(is_right, 0)
        latents["corridor"] = corridor + is_right.long()
        return is_end, is_right

    def _oracle(self, observation: Tensor, memory: Memory) -> Tensor:
        is_start = observation[..., :2].sum(-1) > 0
        turn = recall(memory, "turn", torch.zeros_like(is_start, dtype=torch.long))
        turn = memory["turn"] = torch.where(is_start, observation[..., :2].argmax(-1) + LEFT, turn)
        return self._walk(observation, memory, turn)

    def _walk(self, observation: Tensor, memory: Memory, turn: Tensor) -> Tensor:
        """Return the actions [N] that make the turns [N] where a corridor ends or, for all that is seen, may end."""
        position = observation[..., 2]
        if not self.random_lengths:
            return torch.where(position == 1, turn, FORWARD)
        has_tried = recall(memory, "has_tried", torch.zeros_like(position, dtype=torch.bool))
        is_trying = memory["has_tried"] = (position > 0) & ~has_tried
        return torch.where(is_trying, turn, FORWARD)

    def _memoryless(self, observation: Tensor, memory: Memory) -> Tensor:
        """Return the action of a walk to the end of the longest corridor, then left."""
        return torch.where(observation[..., 2] == 1, LEFT, FORWARD)
