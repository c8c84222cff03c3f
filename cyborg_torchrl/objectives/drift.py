"""State drift: the distance between the states used in an update and those that the present parameters give."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from torch import Tensor, distributions
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl import keys
from cyborg_torchrl.modules.replay import as_primed, state_after, with_states

if TYPE_CHECKING:
    from cyborg_torchrl.objectives.recurrent_ppo import RecurrentClipPPOLoss


@torch.no_grad()
def measure_drift(
    loss: RecurrentClipPPOLoss, steps: TensorDictBase, start: TensorDictBase, used: TensorDictBase, begin: list[int]
) -> dict[str, Tensor]:
    """Compare the sequences of an update with a replay of the whole rollout under the present parameters.

    Args:
        loss: the loss, with the actor that is trained.
        steps: rollouts of n environments, [n, T].
        start: the states before their first steps, [n].
        used: the sequences of the update, chunk after chunk, [C n, K + L], burn-in included.
        begin: the first trained step of each of the C chunks, ascending; all chunks have L steps.

    Returns:
        Means over chunks and environments:
        `state_drift`: |h_used - h_fresh| / |h_fresh| at the first trained step, over all states.
        `drift_kl_first`, `drift_kl_last`: KL(fresh || used) of the policy at the first and last trained step.
        `drift_logits_first`, `drift_logits_last`: the largest relative change of a logit or location.

    Source: after the recurrent state staleness of Kapturowski et al. (2019), "R2D2", section 3, which measures
    Q-values.
    """
    used = loss.after_burn_in(used)
    length, envs = used.shape[1], steps.shape[0]
    fresh: list[TensorDictBase] = []
    with loss.policy() as policy, loss.actor() as actor:
        state, reached = start, 0
        for first in begin:
            if first > reached:
                state = state_after(policy, steps[:, reached:first], state, loss.state_keys)
            reached = first
            chunk = steps[:, first : first + length].exclude(*loss.state_keys)
            fresh.append(with_states(chunk, as_primed(state, chunk.get(keys.IS_INIT)[:, 0])))
        needed = [*actor.in_keys, *loss.state_keys, keys.ACTION]
        both = torch.cat([part.select(*needed, strict=False) for part in (torch.cat(fresh), used)])
        with set_recurrent_mode(True):
            dist = actor.get_dist(both.clone(recurse=False))
    half = envs * len(begin)
    metrics = _policy_distances(dist, half, both.get(keys.ACTION))
    metrics["state_drift"] = _state_distance(both, half, loss.state_keys)
    return metrics


def _policy_distances(dist: distributions.Distribution, half: int, action: Tensor) -> dict[str, Tensor]:
    """Compare the policies of the first half of the batch (fresh states) with those of the second (used states)."""
    log_prob = dist.log_prob(action)
    ratio = log_prob[half:] - log_prob[:half]
    kl = torch.expm1(ratio) - ratio  # unbiased, never negative, and defined for every distribution
    logits = getattr(dist, "logits", None)
    if logits is None:
        logits = getattr(dist, "loc", None)
    if isinstance(dist, distributions.Categorical) and logits is not None:
        log_p, log_q = logits[:half].log_softmax(-1), logits[half:].log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    metrics = {"drift_kl_first": kl[:, 0].mean(), "drift_kl_last": kl[:, -1].mean()}
    if logits is not None:
        change = (logits[half:] - logits[:half]).abs().amax(-1) / logits[:half].abs().amax(-1).clamp_min(1e-12)
        metrics |= {"drift_logits_first": change[:, 0].mean(), "drift_logits_last": change[:, -1].mean()}
    return metrics


def _state_distance(both: TensorDictBase, half: int, state_keys: list) -> Tensor:
    """Return the mean of |h_used - h_fresh| / |h_fresh| at the first step, over all states together."""
    change, size = torch.zeros(half), torch.zeros(half)
    states = both.select(*state_keys, strict=False)[:, 0]
    for key in states.keys(include_nested=True, leaves_only=True):
        value = states.get(key).flatten(1)
        fresh, used = value[:half], value[half:]
        change = change.to(value.device) + (used - fresh).square().sum(1)
        size = size.to(value.device) + fresh.square().sum(1)
    return (change.sqrt() / size.sqrt().clamp_min(1e-12)).mean()
