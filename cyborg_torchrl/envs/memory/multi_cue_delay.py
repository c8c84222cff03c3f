"""`multi_cue_delay`: see cues on several channels at random moments, wait, and name the cue of each channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cyborg_torchrl.envs.memory.task import Latents, Memory, QuestionTask, Sizes, at, four_levels, one_hot, recall_value
from cyborg_torchrl.registry import register_environment


@register_environment("multi_cue_delay")
class MultiCueDelayEnv(QuestionTask):
    """Several delayed cues, as a batch of episodes on one device.

    An episode lasts `3 cues + horizon` steps. In the first `2 cues` steps each channel shows its cue once, at a random
    moment. The last of these steps always shows one. After `horizon` blank steps there is one question for each
    channel, in random order.

    - Observation, [N, cues + values + 1] float: at cues and at questions the channel as one-hot; at cues the cue as
      one-hot; the question flag (last entry). A blank step is all zero.
    - Action, [N] integer in [0, values): the answer is the cue of the channel; other actions are ignored.
    - Reward: +1 for a right answer, -1 for a wrong one, 0 otherwise. The last answer terminates the episode.
    - "success", [N, 1] float: share of right answers.

    Chance is 1 / values.

    Args:
        num_envs: N, number of environments.
        cues: number of channels, each with one cue, 1 or more; None: the level's.
        values: number of different cues, 2 or more.
        horizon: blank steps between the last cue and the first question, 0 or more; None: the level's.
        level: easy (the default), medium, hard or extreme.
        device: device of all tensors.
        seed: seed of the episodes; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range or not an integer, or the level is unknown.
    """

    levels = four_levels((100, 2, 0.85), (300, 4, 0.80), (1000, 6, 0.70), (5000, 10, 0.60))
    default = levels["easy"]
    cues: int
    values: int
    measure = "cues"
    least = {"cues": 1, "values": 2, "horizon": 0}

    def __init__(self, num_envs: int = 64, *, cues: int | None = None, values: int = 4, **shared: Any) -> None:
        super().__init__(num_envs, {"cues": cues, "values": values}, **shared)

    def sizes(self) -> Sizes:
        """Return the sizes that follow from the options."""
        features = self.cues + self.values + 1
        return Sizes(features, actions=self.values, answers=self.cues, steps=3 * self.cues + self.horizon)

    def _draw(self) -> Latents:
        moments = 2 * self.cues
        # Of the steps before the last, cues - 1 show a cue. A permutation decides the order of the channels.
        early = self.permutations(moments - 1, self.cues - 1)
        last = torch.full_like(early[:, :1], moments - 1) if self.cues > 1 else self._time.new_ones(self.num_envs, 1)
        channel_at = torch.full((self.num_envs, moments), self.cues, device=self.device)  # no channel
        channel_at.scatter_(1, torch.cat([early, last], 1), self.permutations(self.cues))
        return {
            "channel_at": channel_at,
            "cue_of": self.randint(self.values, self.cues),
            "order": self.permutations(self.cues),
        }

    def _show(self, time: Tensor, latents: Latents) -> Tensor:
        question = time - self.first_question
        channel = at(latents["channel_at"], time)
        is_cue, is_question = (time < 2 * self.cues) & (channel < self.cues), question >= 0
        channel = torch.where(is_question, at(latents["order"], question), channel)
        return torch.cat(
            [
                one_hot(channel, self.cues, is_cue | is_question),
                one_hot(at(latents["cue_of"], channel), self.values, is_cue),
                is_question.float().unsqueeze(-1),
            ],
            -1,
        )

    def _answer(self, time: Tensor, latents: Latents) -> Tensor:
        channel = at(latents["order"], time - self.first_question)
        return at(latents["cue_of"], channel)

    def _oracle(self, observation: Tensor, memory: Memory) -> Tensor:
        return recall_value(observation, memory, self.cues, self.values)
