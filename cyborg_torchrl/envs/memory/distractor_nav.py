"""`distractor_nav`: see the colour of the goal, pass distractors on a long way, and walk to the door of that colour."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cyborg_torchrl.envs.memory.task import (
    Judgement,
    Latents,
    Memory,
    MemoryTask,
    Sizes,
    at,
    four_levels,
    one_hot,
    recall,
)
from cyborg_torchrl.registry import register_environment

LEFT, RIGHT, ENTER = range(3)


@register_environment("distractor_nav")
class DistractorNavEnv(MemoryTask):
    """Navigation by memory among distractors, as a batch of episodes on one device.

    There are `distractors + 1` colours: the goal's, and one for each distractor. An episode shows the goal's colour and
    then moves the agent along a way of `horizon` steps. If the way is long enough, each distractor flashes up once, at
    a random moment. The way ends in a round room with one door of each colour, in random order, and the agent starts at
    a random door. It sees the door in front of it, turns left or right, and enters. It has three steps for each door.

    - Observation, [N, colours + 2] float: a colour as one-hot; the goal flag (second last entry) at the first step; the
      room flag (last entry) in the room. On the way all entries are zero, except where a distractor flashes up.
    - Action, [N] integer: 0 left, 1 right, 2 enter; ignored before the room.
    - Reward: +1 for entering the goal's door, -1 for another door or for no door within the time. Both terminate the
      episode, since the time limit is a rule of the task.
    - "success", [N, 1] float: 1 if the agent entered the goal's door.

    Chance is 1 / (distractors + 1).

    Args:
        num_envs: N, number of environments.
        distractors: number of distractors, 1 or more; None: the level's.
        horizon: steps of the way, 0 or more; None: the level's.
        level: easy (the default), medium, hard or extreme.
        device: device of all tensors.
        seed: seed of the episodes; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range or not an integer, or the level is unknown.
    """

    levels = four_levels((50, 2, 0.90), (200, 5, 0.80), (500, 10, 0.70), (2000, 20, 0.60))
    default = levels["easy"]
    distractors: int
    measure = "distractors"
    least = {"distractors": 1, "horizon": 0}

    def __init__(self, num_envs: int = 64, *, distractors: int | None = None, **shared: Any) -> None:
        super().__init__(num_envs, {"distractors": distractors}, **shared)
        self.colours = self.distractors + 1

    def sizes(self) -> Sizes:
        """Return the sizes that follow from the options."""
        colours = self.distractors + 1
        return Sizes(features=colours + 2, actions=3, answers=1, steps=1 + self.horizon + 3 * colours)

    def _draw(self) -> Latents:
        colours = self.permutations(self.colours)  # the goal's, then the distractors'
        way = max(1, self.horizon)
        moments = self.permutations(way, self.distractors)
        flash = torch.full((self.num_envs, way), -1, device=self.device)
        flash.scatter_(1, moments, colours[:, 1 : 1 + moments.shape[1]])
        return {
            "goal": colours[:, 0],
            "flash": flash,
            "door": self.permutations(self.colours),
            "place": self.randint(self.colours),
        }

    def _show(self, time: Tensor, latents: Latents) -> Tensor:
        is_goal, is_room = time == 0, time > self.horizon
        flash = at(latents["flash"], time - 1)
        colour = torch.where(is_goal, latents["goal"], flash)
        colour = torch.where(is_room, at(latents["door"], latents["place"]), colour)
        shown = one_hot(colour, self.colours, is_goal | is_room | (flash >= 0))
        return torch.cat([shown, torch.stack([is_goal, is_room], -1).float()], -1)

    def _judge(self, action: Tensor, time: Tensor, latents: Latents) -> Judgement:
        is_room = time > self.horizon
        is_entered = is_room & (action == ENTER)
        is_right = is_entered & (at(latents["door"], latents["place"]) == latents["goal"])
        turn = (action == RIGHT).long() - (action == LEFT).long()
        latents["place"] = torch.where(is_room, (latents["place"] + turn).remainder(self.colours), latents["place"])
        is_over = is_entered | (time == self.max_episode_steps - 1)
        return Judgement(is_over, is_right, is_over)

    def _oracle(self, observation: Tensor, memory: Memory) -> Tensor:
        colour = observation[..., : self.colours]
        goal = torch.where(observation[..., -2:-1] > 0, colour, recall(memory, "goal", torch.zeros_like(colour)))
        memory["goal"] = goal
        return torch.where((goal == colour).all(-1), ENTER, RIGHT)

    def _memoryless(self, observation: Tensor, memory: Memory) -> Tensor:
        """Return the action that enters the first door: right by chance, 1 / (distractors + 1)."""
        return torch.full(observation.shape[:-1], ENTER, device=observation.device)
