"""Advantages of a rollout, from the values that were recorded while it was collected."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl import keys
from cyborg_torchrl.objectives.functional import generalized_advantage

AnyRollout = TypeVar("AnyRollout")


@torch.no_grad()
def add_advantages(
    rollout: AnyRollout, value_operator: TensorDictModuleBase, *, gamma: float, gae_lambda: float
) -> AnyRollout:
    """Writes "advantage" and "value_target" into a rollout [N, T].

    V(s_{t+1}) is the value recorded at the next step. Where there is none (an episode that was cut off, the end of
    the rollout) the value recorded under "next" is taken; without one, the critic is asked about the last observation,
    with the memory state that had been reached: memory is not restarted for it.

    Args:
        rollout: as a collector yields it: a tensordict [N, T], or a `Rollout`.
        value_operator: from an observation and a memory state to "state_value". If no values were recorded, it runs
            over the whole rollout first.
        gamma: discount.
        gae_lambda: lambda of the estimator.

    Raises:
        ValueError: if the rollout is not [N, T].
    """
    steps: Any = getattr(rollout, "steps", rollout)
    if steps.ndim != 2:
        raise ValueError(f"a rollout has batch size [N, T]; got {list(steps.batch_size)}.")
    if steps.get(keys.VALUE, None) is None:
        with set_recurrent_mode(True):
            steps.set(keys.VALUE, value_operator(steps.copy()).get(keys.VALUE))
    value_t = steps.get(keys.VALUE).squeeze(-1)
    reward, done, terminated = (
        steps.get((keys.NEXT, key)).squeeze(-1) for key in (keys.REWARD, keys.DONE, keys.TERMINATED)
    )
    value_tp1 = torch.cat([value_t[:, 1:], torch.zeros_like(value_t[:, :1])], 1)
    is_cut = done & ~terminated
    is_cut[:, -1] = ~terminated[:, -1]
    if bool(is_cut.any()):
        following = steps.get(keys.NEXT)
        recorded = following.get(keys.VALUE, None)
        if recorded is None:
            value_tp1[is_cut] = value_after(following[is_cut], value_operator).squeeze(-1)
        else:
            value_tp1[is_cut] = recorded.squeeze(-1)[is_cut]
    advantage, target = generalized_advantage(
        reward.to(value_t.dtype), value_t, value_tp1, terminated, done, gamma, gae_lambda
    )
    steps.set(keys.ADVANTAGE, advantage.unsqueeze(-1))
    steps.set(keys.VALUE_TARGET, target.unsqueeze(-1))
    return rollout


@torch.no_grad()
def value_after(following: TensorDictBase, value_operator: TensorDictModuleBase) -> Tensor:
    """Values of observations that no step was taken from, [B, 1], with the memory states that had been reached.

    Args:
        following: what stands under "next" of the last steps, [B]; memory is not restarted for it.
        value_operator: from an observation and a memory state to "state_value".
    """
    read = [key for key in value_operator.in_keys if key != keys.IS_INIT]
    last = following.select(*read, strict=False)
    device = next(iter(last.values(True, True))).device  # a tensordict may have none of its own
    last.set(keys.IS_INIT, torch.zeros(*last.batch_size, 1, dtype=torch.bool, device=device))
    with set_recurrent_mode(False):
        return value_operator(last).get(keys.VALUE)
