"""`distractor_nav`: see the colour of the goal, pass distractors on a long way, and walk to the door of that colour."""

from __future__ import annotations

import torch
from torch import Tensor

from cyborg_torchrl.envs.memory.task import (
    Judgement,
    Latents,
    Level,
    MemoryTask,
    ReferencePolicy,
    at,
    check_least,
    one_hot,
)
from cyborg_torchrl.registry import register_environment

LEFT, RIGHT, ENTER = range(3)


@register_environment("distractor_nav")
class DistractorNavEnv(MemoryTask):
    """Navigation by memory among distractors, batched on one device.

    There are `distractors + 1` colours: the goal's, and one for each distractor. An episode shows the goal's colour,
    then carries the agent along a way of `horizon` steps, on which each distractor flashes up once, at a moment drawn
    for each episode (if the way is long enough), and leads into a round room with a door of each colour, in an order
    and from a place drawn for each episode. There the agent sees the door in front of it, turns left or right, and
    enters. It has `3 doors` steps for that.

    - Observation, [N, colours + 2] float: a colour as one-hot; the goal flag (second last entry) at the first step; the
      room flag (last entry) in the room. On the way all is zero, but where a distractor flashes up.
    - Action, [N] integer: 0 left, 1 right, 2 enter; ignored before the room.
    - Reward: +1 for entering the goal's door, -1 for another door or for none within the time. Both terminate the
      episode: the time is a rule of the task.
    - "success", [N, 1] float: 1 where the goal's door was entered.

    Chance is 1 / (distractors + 1).

    Args:
        num_envs: N, environments side by side.
        distractors: number of distractors, 1 or more; None: the level's.
        horizon: steps of the way, 0 or more; None: the level's.
        level: easy (the default), medium, hard or extreme.
        device: where it runs.
        seed: seed of the episodes; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range or no integer, or the level unknown.
    """

    levels = {
        "easy": Level(50, 2, 0.90),
        "medium": Level(200, 5, 0.80),
        "hard": Level(500, 10, 0.70),
        "extreme": Level(2000, 20, 0.60),
    }
    default = levels["easy"]

    def __init__(
        self,
        num_envs: int = 64,
        *,
        distractors: int | None = None,
        horizon: int | None = None,
        level: str | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> None:
        horizon, distractors = self.choose(level, horizon, distractors)
        check_least(num_envs=(num_envs, 1), distractors=(distractors, 1), horizon=(horizon, 0))
        colours = distractors + 1
        super().__init__(
            num_envs,
            horizon,
            features=colours + 2,
            actions=3,
            num_answers=1,
            max_episode_steps=1 + horizon + 3 * colours,
            device=device,
            seed=seed,
        )
        self.distractors, self.colours = distractors, colours

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

    def oracle(self) -> ReferencePolicy:
        """Keeps the goal's colour, and turns right until it stands before its door."""
        return _Oracle(self.colours)

    def memoryless(self) -> ReferencePolicy:
        """Enters the first door: right by chance, 1 / (distractors + 1)."""
        return _FirstDoor()


class _Oracle(ReferencePolicy):
    """Keeps the goal's colour of each environment."""

    def __init__(self, colours: int) -> None:
        super().__init__()
        self.colours = colours
        self._goal: Tensor | None = None

    def act(self, observation: Tensor) -> Tensor:
        colour = observation[..., : self.colours]
        if self._goal is None or self._goal.shape != colour.shape:
            self._goal = torch.zeros_like(colour)
        self._goal = torch.where(observation[..., -2:-1] > 0, colour, self._goal)
        return torch.where((self._goal == colour).all(-1), ENTER, RIGHT)


class _FirstDoor(ReferencePolicy):
    """Enters whatever is in front."""

    def act(self, observation: Tensor) -> Tensor:
        return torch.full(observation.shape[:-1], ENTER, device=observation.device)
