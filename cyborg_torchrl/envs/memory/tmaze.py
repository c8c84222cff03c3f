"""`tmaze`: see at the start where the goal will be, walk down a corridor, and turn to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cyborg_torchrl.envs.memory.task import Judgement, Latents, Memory, MemoryTask, Sizes, four_levels, recall
from cyborg_torchrl.registry import register_environment

FORWARD, UP, BACK, DOWN = range(4)


@register_environment("tmaze")
class TMazeEnv(MemoryTask):
    """Passive T-maze, as a batch of episodes on one device.

    The agent starts at one end of a corridor. There it sees on which side of the other end the goal is, `horizon` steps
    away. An episode lasts `horizon + 1` steps: exactly enough to walk there and turn. An agent that once fails to walk
    forward cannot arrive, and does not see its position.

    - Observation, [N, 5] float: at the first step the side of the goal (up: entry 0, down: entry 1); in the corridor
      all zero; at its end the end flag (entry 2), with the side that the agent has turned to (up: entry 3, down:
      entry 4).
    - Action, [N] integer: 0 forward, 1 up, 2 back, 3 down; a move into a wall changes nothing.
    - Reward: -1 / horizon for each step after which the agent is behind one that always walks forward. The last step
      instead gives +1 at the goal, and terminates the episode.
    - "success", [N, 1] float: 1 if the agent reached the goal.

    Chance is 1 / 2, for an agent that walks forward and turns to one side.

    Args:
        num_envs: N, number of environments.
        horizon: length of the corridor, 1 or more; None: the level's.
        level: easy (the default), medium, hard or extreme.
        device: device of all tensors.
        seed: seed of the episodes; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range or not an integer, or the level is unknown.

    Source: Ni et al. (2023), "When do transformers shine in RL?", the passive T-maze, after Bakker (2001). Sides are
    one-hot here, and +-1 there.
    """

    levels = four_levels((50, 2, 0.95), (250, 2, 0.95), (1000, 2, 0.95), (10_000, 2, 0.95))
    default = levels["easy"]
    least = {"horizon": 1}
    has_fixed_length = True

    def __init__(self, num_envs: int = 64, **shared: Any) -> None:
        super().__init__(num_envs, {}, **shared)

    def sizes(self) -> Sizes:
        """Return the sizes that follow from the options."""
        return Sizes(features=5, actions=4, answers=1, steps=self.horizon + 1)

    def _draw(self) -> Latents:
        zero = torch.zeros_like(self._time)
        return {"goal": self.randint(2) * 2 - 1, "x": zero, "y": zero}  # goal and y: 1 up, -1 down

    def _show(self, time: Tensor, latents: Latents) -> Tensor:
        goal, y, is_end = latents["goal"], latents["y"], latents["x"] == self.horizon
        is_first = time == 0
        entries = (is_first & (goal == 1), is_first & (goal == -1), is_end, is_end & (y == 1), is_end & (y == -1))
        return torch.stack(entries, -1).float()

    def _judge(self, action: Tensor, time: Tensor, latents: Latents) -> Judgement:
        x, y = latents["x"], latents["y"]
        along = (action == FORWARD).long() - (action == BACK).long()
        across = (action == UP).long() - (action == DOWN).long()
        is_end = x == self.horizon
        latents["x"] = torch.where(y == 0, x + along, x).clamp(0, self.horizon)
        latents["y"] = torch.where(is_end, y + across, y).clamp(-1, 1)
        is_last = time == self.horizon
        is_right = is_last & (latents["y"] == latents["goal"])
        is_behind = ~is_last & (latents["x"] < time + 1)
        # An answer is worth +1 or 0 here, so the bonus cancels the -1 of the base class for a wrong answer.
        bonus = (is_last & ~is_right).float() - is_behind.float() / self.horizon
        return Judgement(is_last, is_right, is_last, bonus)

    def _oracle(self, observation: Tensor, memory: Memory) -> Tensor:
        is_first = observation[..., :2].sum(-1) > 0
        is_down = recall(memory, "is_down", torch.zeros_like(is_first))
        is_down = torch.where(is_first, observation[..., 1] > 0, is_down)
        memory["is_down"] = is_down
        return torch.where(observation[..., 2] > 0, torch.where(is_down, DOWN, UP), FORWARD)

    def _memoryless(self, observation: Tensor, memory: Memory) -> Tensor:
        """Return the action of a walk to the end, then up: right by chance, 1 / 2."""
        return torch.where(observation[..., 2] > 0, UP, FORWARD)
