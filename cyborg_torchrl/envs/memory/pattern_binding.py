"""`pattern_binding`: see patterns of a shape and a colour, wait, and distinguish them from recombinations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cyborg_torchrl.envs.memory.task import Latents, Memory, QuestionTask, Sizes, at, four_levels, one_hot, recall
from cyborg_torchrl.registry import register_environment


@register_environment("pattern_binding")
class PatternBindingEnv(QuestionTask):
    """Binding of features, as a batch of episodes on one device.

    An episode lasts `2 patterns + horizon` steps: the patterns one by one, `horizon` blank steps, and one probe for
    each pattern, in random order. A pattern is a shape and a colour that no other pattern of the episode has. Half of
    the probes are the patterns. The others have exchanged their colours. Each shape and each colour is probed once, so
    an agent that remembers shapes and colours, but not their pairs, is at chance.

    - Observation, [N, 2 (patterns + 1) + 1] float: shape and colour, each as one-hot of `patterns + 1`; the probe flag
      (last entry). A blank step is all zero.
    - Action, [N] integer: at a probe 1 for "shown", 0 for "recombined"; other actions are ignored.
    - Reward: +1 for a right answer, -1 for a wrong one, 0 otherwise. The last answer terminates the episode.
    - "success", [N, 1] float: share of right answers.

    Chance is 1 / 2. Each probe is recombined with probability 1 / 2, independently. A single one could not exchange its
    colour: then none or two are recombined.

    Args:
        num_envs: N, number of environments.
        patterns: number of patterns, 2 or more; None: the level's.
        horizon: blank steps between the last pattern and the first probe, 0 or more; None: the level's.
        level: easy (the default), medium, hard or extreme.
        device: device of all tensors.
        seed: seed of the episodes; None draws one from torch's generator.

    Raises:
        ValueError: if a number is out of range or not an integer, or the level is unknown.

    Source: the binding condition of Wheeler and Treisman (2002), with patterns shown one after another.
    """

    levels = four_levels((100, 3, 0.85), (300, 5, 0.75), (1000, 8, 0.65), (5000, 12, 0.55))
    default = levels["easy"]
    patterns: int
    measure = "patterns"
    least = {"patterns": 2, "horizon": 0}

    def __init__(self, num_envs: int = 64, *, patterns: int | None = None, **shared: Any) -> None:
        super().__init__(num_envs, {"patterns": patterns}, **shared)
        self.kinds = self.patterns + 1

    def sizes(self) -> Sizes:
        """Return the sizes that follow from the options."""
        features = 2 * (self.patterns + 1) + 1
        return Sizes(features, actions=2, answers=self.patterns, steps=2 * self.patterns + self.horizon)

    def _draw(self) -> Latents:
        shape = self.permutations(self.kinds, self.patterns)
        colour = self.permutations(self.kinds, self.patterns)
        probe = self.permutations(self.patterns)
        is_bound, owner = self._recombine()
        return {
            "shape": torch.cat([shape, shape.gather(1, probe)], 1),  # of the patterns, then of the probes
            "colour": torch.cat([colour, colour.gather(1, owner.gather(1, probe))], 1),
            "is_bound": is_bound.gather(1, probe),
        }

    def _recombine(self) -> tuple[Tensor, Tensor]:
        """Draw which patterns are probed unchanged, and the pattern whose colour each probe has, both [N, patterns]."""
        number = torch.arange(self.patterns, device=self.device)
        is_bound = self.randint(2, self.patterns) > 0
        order = self.permutations(self.patterns)
        # A single recombined pattern becomes none or two, with equal chance, so the mean stays one half.
        is_alone = (~is_bound).sum(1, keepdim=True) == 1
        rank = order + self.patterns * is_bound  # the recombined first
        second = torch.zeros_like(is_bound).scatter(1, rank.argsort(1)[:, 1:2], True)
        is_pair = self.randint(2, 1) > 0
        is_bound = torch.where(is_alone, torch.where(is_pair, is_bound & ~second, True), is_bound)
        # The recombined patterns form a ring, and each takes the colour of the next.
        ring = (order + self.patterns * is_bound).argsort(1)
        many = (~is_bound).sum(1, keepdim=True)
        following = torch.where(number + 1 < many, number + 1, 0).expand_as(ring)
        partner = torch.where(number < many, ring.gather(1, following), ring)
        return is_bound, torch.empty_like(ring).scatter(1, ring, partner)

    def _show(self, time: Tensor, latents: Latents) -> Tensor:
        is_pattern, is_probe = time < self.patterns, time >= self.first_question
        index = torch.where(is_pattern, time, time - self.horizon)
        shape = one_hot(at(latents["shape"], index), self.kinds, is_pattern | is_probe)
        colour = one_hot(at(latents["colour"], index), self.kinds, is_pattern | is_probe)
        return torch.cat([shape, colour, is_probe.float().unsqueeze(-1)], -1)

    def _answer(self, time: Tensor, latents: Latents) -> Tensor:
        return at(latents["is_bound"], time - self.first_question).long()

    def _oracle(self, observation: Tensor, memory: Memory) -> Tensor:
        shape, colour = observation[..., : self.kinds], observation[..., self.kinds : -1]
        colour_of = recall(memory, "colour_of", observation.new_zeros(*shape.shape, self.kinds))
        remembered = (colour_of * shape.unsqueeze(-1)).sum(-2)
        is_pattern = (shape > 0) & (observation[..., -1:] == 0)
        memory["colour_of"] = torch.where(is_pattern.unsqueeze(-1), colour.unsqueeze(-2), colour_of)
        return (remembered * colour).sum(-1).long()
