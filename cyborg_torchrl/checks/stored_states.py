"""Stored states: their distance from those of the new parameters after some updates, and their memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, distributions

from cyborg_torchrl import keys
from cyborg_torchrl.checks.findings import Finding, inform, skip
from cyborg_torchrl.checks.policy_under_test import Pass, PolicyUnderTest
from cyborg_torchrl.checks.probe import TINY, random_weights
from cyborg_torchrl.checks.report import DriftCurve
from cyborg_torchrl.checks.rollout import Rollout
from cyborg_torchrl.objectives.functional import generalized_advantage, masked_standardize

KL, OUTPUT, STATE = "drift: KL(fresh || stored)", "drift: |dparams| / max |params|", "drift: |dh| / |h|"
CLIP, GAMMA = 0.2, 0.99
SAMPLES = 256
STEPS, MEGABYTE = 100_000, 1e6


def report_drift(
    tested: PolicyUnderTest, rollout: Rollout, length: int, updates: int, learning_rate: float, *, rows: int = 8
) -> tuple[list[Finding], DriftCurve | None]:
    """Report the drift of stored states after 1, 2, 4, ... optimiser updates, for chunks that begin within an episode.

    The fresh state is computed by the new parameters from the row's first step on. The stored state is the rollout's.
    The policy has its old parameters again afterwards.

    Source: Kapturowski et al. (2019), section 3, whose delta-Q compares Q-values.
    """
    steps = rollout.steps[:rows]
    is_init = steps.get(tested.is_init_key).squeeze(-1)
    starts = [start for start in range(length, steps.shape[1] - length + 1, length) if not is_init[:, start].all()]
    text = "No chunk begins within an episode, so no state is stored that could drift." if not starts else ""
    if not tested.parameters():
        text = "The policy has no trained parameters."
    if text:
        return [skip(name, text) for name in (KL, OUTPUT, STATE)], None
    points: list[tuple[int, Tensor | None, Tensor, Tensor]] = []
    with tested.changing_parameters() as parameters:
        for update in _train(tested, parameters, steps, updates, learning_rate):
            if update == updates or update.bit_count() == 1:
                points.append((update, *_compare(tested, steps, starts, length, rollout.is_primed)))
        if not points:  # no updates, or sequence mode has no gradient
            points.append((0, *_compare(tested, steps, starts, length, rollout.is_primed)))
    last, kl, change, distance = points[-1]
    after = f"after {last} Adam updates at {learning_rate:g} on this rollout"
    kl_text = f"Mean KL between the policies with fresh and with stored memory, {after}."
    findings = [
        skip(KL, "The policy gives no torch distribution.") if kl is None else inform(KL, float(kl), kl_text),
        inform(OUTPUT, float(change), f"Mean change of the distribution's parameters, {after}."),
        inform(STATE, float(distance), f"Relative distance of fresh and stored states where chunks begin, {after}."),
    ]
    states, params = (tuple(float(point[index]) for point in points) for index in (3, 2))
    return findings, DriftCurve(tuple(point[0] for point in points), states, params)


def _train(
    tested: PolicyUnderTest, parameters: list[Tensor], steps: TensorDictBase, updates: int, learning_rate: float
) -> Iterator[int]:
    """Take optimiser steps of the clipped surrogate on whole rows, and yield their number after each.

    Returns-to-go are the advantages. Without log-probs the loss is a random combination of the outputs.
    """
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, eps=1e-5)
    advantage = _advantage(steps, tested.is_init_key)
    for update in range(1, updates + 1):
        run = tested.run_sequence(steps)
        log_prob = tested.log_prob(run, steps)
        if log_prob is None:
            loss = -(run.params * random_weights(run.params)).mean()
        else:
            ratio = (log_prob - tested.recorded_score(steps).squeeze(-1)).exp()
            loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
        if not loss.requires_grad:  # a no_grad block, which the gradient horizon reports
            return
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        yield update


def _advantage(steps: TensorDictBase, is_init_key: NestedKey) -> Tensor:
    """Return standardised discounted returns within the rollout; noise if there are no rewards."""
    reward = steps.get((keys.NEXT, keys.REWARD), None)
    noise = torch.randn(steps.shape, generator=torch.Generator().manual_seed(0)).to(steps.get(is_init_key).device)
    if reward is None:
        return noise
    reward = reward.reshape(*steps.shape, -1).sum(-1).float()
    ends = steps.get(is_init_key).squeeze(-1).roll(-1, 1)
    zero = torch.zeros_like(reward)
    returns, _ = generalized_advantage(reward, zero, zero, ends, ends, GAMMA, 1.0)
    return masked_standardize(returns) if float(returns.std()) > 0 else noise


@torch.no_grad()
def _compare(
    tested: PolicyUnderTest, steps: TensorDictBase, starts: list[int], length: int, is_primed: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the mean KL, the mean relative change of parameters, and the relative distance of states."""
    fresh = tested.run_steps(steps, is_primed=is_primed)
    scale = fresh.params.abs().max().clamp_min(TINY)
    kls, changes = [], []
    distance = norm = torch.zeros_like(scale)
    for start in starts:
        stored = tested.run_steps(steps[:, start : start + length], is_primed=is_primed)
        if isinstance(fresh.dist[0], distributions.Distribution):
            kls.append(_kl(fresh, stored, start))
        change = fresh.params[:, start : start + length] - stored.params
        changes.append(change.abs().amax(-1).mean() / scale)
        continues = ~steps.get(tested.is_init_key)[:, start].squeeze(-1)
        for key, value in fresh.states[start - 1].items():
            if not value.is_floating_point():  # a counter does not age
                continue
            recorded, new = steps.get(key)[:, start][continues].float(), value[continues].float()
            distance = distance + (new - recorded).square().sum()
            norm = norm + new.square().sum()
    relative = distance.sqrt() / norm.sqrt().clamp_min(TINY)
    return torch.stack(kls).mean() if kls else None, torch.stack(changes).mean(), relative


def _kl(fresh: Pass, stored: Pass, start: int) -> Tensor:
    pairs = zip(fresh.dist[start : start + len(stored.dist)], stored.dist, strict=True)
    return torch.stack([_kl_of(p, q).mean() for p, q in pairs]).mean()


def _kl_of(p: distributions.Distribution, q: distributions.Distribution) -> Tensor:
    try:
        return distributions.kl_divergence(p, q)
    except NotImplementedError:  # torch has no formula for these distributions, so estimate it
        with torch.random.fork_rng():
            action = p.sample(torch.Size([SAMPLES]))
        return (p.log_prob(action) - q.log_prob(action)).mean(0)


def report_storage(tested: PolicyUnderTest, rollout: Rollout, length: int) -> list[Finding]:
    """Report the megabytes (10^6 bytes) of states, stored at each step and once a chunk."""
    states = tested.states_of(rollout.steps).values()
    size = sum(value[0, 0].numel() * value.element_size() for value in states)
    megabytes = size * STEPS / MEGABYTE
    name = "states, MB per 100,000 steps"
    every = f"{size} bytes a state; a TorchRL rollout holds it a second time under 'next'."
    once = "For a buffer that stores the state before each chunk and replays the rest."
    return [
        inform(f"{name}: each step stored", megabytes, every),
        inform(f"{name}: one a chunk of {length}", megabytes / length, once),
    ]
