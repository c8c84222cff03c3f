"""Advantages of a rollout, from the values recorded while it was collected."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl import keys
from cyborg_torchrl.modules.replay import memory_state_keys
from cyborg_torchrl.objectives.functional import generalized_advantage

AnyRollout = TypeVar("AnyRollout")


@torch.no_grad()
def add_advantages(
    rollout: AnyRollout, value_operator: TensorDictModuleBase, *, gamma: float, gae_lambda: float
) -> AnyRollout:
    """Write "advantage" and "value_target" into a rollout [N, T], and return it.

    V(s_{t+1}) is the value recorded at the next step. A truncated episode and the end of the rollout have no next step.
    There the value recorded under "next" is used. If there is none, the critic computes it from the last observation
    and the memory state reached by then, so memory is not restarted.

    Args:
        rollout: a tensordict [N, T], or a `Rollout`.
        value_operator: from an observation and a memory state to "state_value". If no values were recorded, it first
            runs over the whole rollout.
        gamma: discount in [0, 1].
        gae_lambda: lambda of the estimator in [0, 1].

    Raises:
        ValueError: if the rollout is not [N, T], or has neither values nor the critic's memory states.
    """
    steps: Any = getattr(rollout, "steps", rollout)
    if steps.ndim != 2:
        raise ValueError(f"a rollout has batch size [N, T]; got {list(steps.batch_size)}.")
    done = steps.get((keys.NEXT, keys.DONE)).squeeze(-1)
    terminated = steps.get((keys.NEXT, keys.TERMINATED)).squeeze(-1)
    is_cut = done & ~terminated
    is_cut[:, -1] = ~terminated[:, -1]
    if steps.get(keys.VALUE, None) is None:
        _check_memory(steps, value_operator, has_cuts=bool(is_cut.any()))
        with set_recurrent_mode(True):
            steps.set(keys.VALUE, value_operator(steps.copy()).get(keys.VALUE))
    value_t = steps.get(keys.VALUE).squeeze(-1)
    value_t = value_t.to(torch.promote_types(value_t.dtype, torch.float32))  # values of autocast are bfloat16
    reward = steps.get((keys.NEXT, keys.REWARD)).squeeze(-1)
    value_tp1 = torch.cat([value_t[:, 1:], torch.zeros_like(value_t[:, :1])], 1)
    if bool(is_cut.any()):
        following = steps.get(keys.NEXT)
        recorded = following.get(keys.VALUE, None)
        if recorded is None:
            value_tp1[is_cut] = value_after(following[is_cut], value_operator).squeeze(-1).to(value_t.dtype)
        else:
            value_tp1[is_cut] = recorded.squeeze(-1)[is_cut].to(value_t.dtype)
    advantage, target = generalized_advantage(
        reward.to(value_t.dtype), value_t, value_tp1, terminated, done, gamma, gae_lambda
    )
    steps.set(keys.ADVANTAGE, advantage.unsqueeze(-1))
    steps.set(keys.VALUE_TARGET, target.unsqueeze(-1))
    return rollout


def _check_memory(steps: TensorDictBase, value_operator: TensorDictModuleBase, *, has_cuts: bool) -> None:
    """Refuse a rollout without the states of the critic's memory, unless it holds whole episodes only."""
    missing = [key for key in memory_state_keys(value_operator) if steps.get(key, None) is None]
    is_init = steps.get(keys.IS_INIT, None)
    begins_with_episodes = is_init is not None and bool(is_init[:, 0].all())
    if missing and (has_cuts or not begins_with_episodes):
        raise ValueError(
            f"the critic has a memory {missing}, which the rollout does not hold. It begins or ends within episodes, "
            "so the values would be those of another memory. Collect with RolloutCollector, which lets the critic act "
            "too, or give another collector TensorDictSequential(actor, critic) as its policy."
        )


@torch.no_grad()
def value_after(following: TensorDictBase, value_operator: TensorDictModuleBase) -> Tensor:
    """Return the values of last observations, [B, 1], with the memory states reached by then.

    Args:
        following: the entries under "next" of the last steps, [B]; memory is not restarted.
        value_operator: from an observation and a memory state to "state_value".
    """
    read = [key for key in value_operator.in_keys if key != keys.IS_INIT]
    last = following.select(*read, strict=False)
    device = next(iter(last.values(True, True))).device  # the tensordict itself may have no device
    last.set(keys.IS_INIT, torch.zeros(*last.batch_size, 1, dtype=torch.bool, device=device))
    with set_recurrent_mode(False):
        return value_operator(last).get(keys.VALUE)
