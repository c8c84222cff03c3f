"""`delayed_cue`: see a cue, wait, and name it when asked."""

from __future__ import annotations

import torch
from torch import Tensor

from cyborg_torchrl.envs.memory.task import (
    ConstantAnswer,
    Judgement,
    Latents,
    Level,
    MemoryTask,
    ReferencePolicy,
    check_least,
)
from cyborg_torchrl.registry import register_environment


@register_environment("delayed_cue")
class DelayedCueEnv(MemoryTask):
    """Delayed cue, batched on one device.

    An episode lasts `horizon + 2` steps: the cue, `horizon` blank steps, the query.

    - Observation, [N, cues + 2] float: the cue as one-hot with the cue flag (second last entry) at the first step;
      all zero while blank; the query flag (last entry) at the last step.
    - Action, [N] integer in [0, cues): the action at the query is the answer; all others are ignored.
    - Reward: +1 for the right answer, -1 for a wrong one, 0 otherwise. The answer terminates the episode.
    - "success", [N, 1] float: 1 where the answer was right.

    Chance is 1 / cues. Nothing but memory helps: between cue and query all observations are the same.

    Args:
        num_envs: N, environments side by side.
        cues: number of different cues, 2 or more; None: the level's.
        horizon: blank steps between cue and query, 0 or more; None: the level's.
        level: easy, medium, hard or extreme; None: 4 cues, 1000 blank steps.
        device: where it runs.
        seed: seed of the cues; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range or no integer, or the level unknown.
    """

    levels = {
        "easy": Level(50, 4, 0.95),
        "medium": Level(200, 8, 0.90),
        "hard": Level(1000, 8, 0.80),
        "extreme": Level(5000, 16, 0.70),
    }
    default = Level(1000, 4, 0.95)

    def __init__(
        self,
        num_envs: int = 64,
        *,
        cues: int | None = None,
        horizon: int | None = None,
        level: str | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> None:
        horizon, cues = self.choose(level, horizon, cues)
        check_least(num_envs=(num_envs, 1), cues=(cues, 2), horizon=(horizon, 0))
        super().__init__(
            num_envs,
            horizon,
            features=cues + 2,
            actions=cues,
            num_answers=1,
            max_episode_steps=horizon + 2,
            device=device,
            seed=seed,
        )
        self.cues = cues
        # one row for each kind of step, so that an observation is one look-up: each cue, blank, query
        self._shown = torch.zeros(cues + 2, cues + 2, device=self.device)
        self._shown[:cues, :cues] = torch.eye(cues)
        self._shown[:cues, -2] = 1.0
        self._shown[-1, -1] = 1.0

    def _draw(self) -> Latents:
        return {"cue": self.randint(self.cues)}

    def _show(self, time: Tensor, latents: Latents) -> Tensor:
        kind = torch.where(time == 0, latents["cue"], self.cues)
        return self._shown.index_select(0, kind + (time == self.horizon + 1))

    def _judge(self, action: Tensor, time: Tensor, latents: Latents) -> Judgement:
        is_query = time == self.horizon + 1
        return Judgement(is_query, is_query & (action == latents["cue"]), is_query)

    def oracle(self) -> ReferencePolicy:
        """Names the cue last seen."""
        return _Oracle(self.cues)

    def memoryless(self) -> ReferencePolicy:
        """One fixed answer, right by chance, 1 / cues."""
        return ConstantAnswer()


class _Oracle(ReferencePolicy):
    """Names the cue last seen by each environment."""

    def __init__(self, cues: int) -> None:
        super().__init__()
        self.cues = cues
        self._cue: Tensor | None = None

    def act(self, observation: Tensor) -> Tensor:
        seen = observation[..., : self.cues].argmax(-1)
        if self._cue is None or self._cue.shape != seen.shape:
            self._cue = torch.zeros_like(seen)
        self._cue = torch.where(observation[..., -2] > 0, seen, self._cue)
        return self._cue
