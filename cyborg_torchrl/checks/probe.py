"""Sequences for experiments: cut from a rollout, with noise on the observations and with added resets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from tensordict import TensorDictBase
from torch import Tensor

from cyborg_torchrl.checks.policy_under_test import Pass, PolicyUnderTest
from cyborg_torchrl.checks.rollout import Rollout

TINY = 1e-30


@dataclass(frozen=True)
class Probe:
    """Sequences [B, L], B >= 2, from recorded states in the middle of an episode.

    Observations are the recorded ones plus noise. At a blank observation a gate may be closed and its gradient zero by
    accident.
    """

    tested: PolicyUnderTest
    steps: TensorDictBase
    first_reset: Tensor
    """The first step that begins an episode, [B]; L if there is none."""
    is_primed: bool
    generator: torch.Generator

    @property
    def is_before(self) -> Tensor:
        """True for the steps before the first reset, [B, L]."""
        return torch.arange(self.steps.shape[1]) < self.first_reset.unsqueeze(1)

    def run(self, mode: str) -> Pass:
        """Run the policy in "sequence" or "step" mode."""
        if mode == "sequence":
            return self.tested.run_sequence(self.steps)
        return self.tested.run_steps(self.steps, is_primed=self.is_primed)

    def disturbed(self, where: Tensor, *, is_state: Tensor) -> Probe:
        """Return a copy with other observations at `where` [B, L] and other first states in rows `is_state` [B]."""
        steps = self.steps.clone()
        for key in self.tested.input_keys:
            value = steps.get(key)
            other = _other(value, self.generator, scale=3.0)
            steps.set(key, torch.where(_expand(where, value), other, value))
        # The state at resets comes from the environment, so it does not change.
        has_state = is_state.unsqueeze(1) & (self.is_before | (self.first_reset.unsqueeze(1) == 0))
        for key in self.tested.state_keys:
            value = steps.get(key)
            first = _other(value[:, :1], self.generator, scale=1.0).expand_as(value)
            steps.set(key, torch.where(_expand(has_state, value), first, value))
        return replace(self, steps=steps)

    def with_gradient(self) -> tuple[Probe, list[Tensor], list[Tensor]]:
        """Return a copy whose float observations and states [B, L, ...] require gradients, and these tensors."""
        steps = self.steps.clone()
        groups = (self.tested.input_keys, self.tested.state_keys)
        names = [[key for key in group if steps.get(key).is_floating_point()] for group in groups]
        for key in (*names[0], *names[1]):
            steps.set(key, steps.get(key).clone().requires_grad_())
        observations, states = ([steps.get(key) for key in group] for group in names)
        return replace(self, steps=steps), observations, states


def build_probe(
    tested: PolicyUnderTest, rollout: Rollout, length: int, seed: int, *, rows: int = 6, has_resets: bool = True
) -> Probe:
    """Cut the rollout into sequences, from its end.

    With `has_resets`, each row except the first gets one or two resets: next to each other, at its second step, at its
    last step, or at random. So environments whose episodes never end are checked as well.
    """
    generator = torch.Generator().manual_seed(seed)
    total = rollout.steps.shape[1]
    length = min(length, total // 2)
    ends = range(total, length - 1, -length)
    steps = torch.cat([rollout.steps[:rows, end - length : end] for end in ends], 0)[:rows].clone()
    for key in tested.input_keys:
        value = steps.get(key)
        if value.is_floating_point():
            steps.set(key, _other(value, generator, scale=1.0))
    flags = torch.zeros(steps.shape, dtype=torch.bool)
    if has_resets:
        flags[1:] = _resets(steps.shape[0] - 1, length, generator)
    first_reset = torch.where(flags.any(1), flags.float().argmax(1), length)
    steps.set(tested.is_init_key, flags.unsqueeze(-1).to(steps.get(tested.is_init_key).device))
    is_later = flags.cumsum(1) > 0
    for key in tested.state_keys:
        value = steps.get(key)
        first = value[:, :1].expand_as(value)
        steps.set(key, torch.where(_expand(is_later, value), rollout.fresh_state[key].expand_as(value), first))
    return Probe(tested, steps, first_reset, rollout.is_primed, generator)


def distance(a: Tensor, b: Tensor, where: Tensor | None = None) -> float:
    """Return the largest difference of parameters [B, L, P], relative to the largest parameter.

    Args:
        a: the parameters of a run.
        b: those of another run.
        where: the steps to compare, [B, L]; None: all.
    """
    if where is None:
        where = torch.ones(a.shape[:2], dtype=torch.bool)
    if not bool(where.any()):
        return 0.0
    change = (a.detach() - b.detach())[where.to(a.device)].abs().max()
    return float(change / a.detach().abs().max().clamp_min(TINY))


def random_weights(params: Tensor) -> Tensor:
    """Return weights of a random combination of parameters, in their shape; always the same."""
    weights = torch.randn(params.shape, generator=torch.Generator().manual_seed(0))
    return weights.to(device=params.device, dtype=params.dtype)


def _resets(rows: int, length: int, generator: torch.Generator) -> Tensor:
    flags = torch.zeros(rows, length, dtype=torch.bool)
    fixed = [(length // 2, length // 2 + 1), (1,), (length - 1,)]
    for row in range(rows):
        drawn = torch.randint(1, length, (2,), generator=generator).tolist()
        for t in fixed[row] if row < len(fixed) else drawn:
            flags[row, min(t, length - 1)] = True
    return flags


def _other(value: Tensor, generator: torch.Generator, *, scale: float) -> Tensor:
    """Add noise of `scale` times the spread to floats [B, L, ...]. Shuffle other values: they stay in their range."""
    if not value.is_floating_point():
        order = torch.randperm(value.shape[0] * value.shape[1], generator=generator).to(value.device)
        return value.flatten(0, 1)[order].view_as(value)
    spread = value.float().std() if value.numel() > 1 else torch.zeros(())
    spread = float(spread) if float(spread) > 0 else 1.0
    noise = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
    return value + scale * spread * noise


def _expand(mask: Tensor, value: Tensor) -> Tensor:
    return mask.to(value.device).view(*mask.shape, *(1,) * (value.ndim - mask.ndim))
