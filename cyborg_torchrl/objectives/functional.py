"""Loss mathematics as pure functions. The suffixes `_t` and `_tp1` mark time, which is the last dimension."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cyborg_torchrl.cores.kernels.native import needs_gradient
from cyborg_torchrl.cores.kernels.triton.linear_scan import generalized_advantage_triton
from cyborg_torchrl.cores.kernels.triton.loading import is_triton


def generalized_advantage(
    reward_t: Float[Tensor, "N T"],
    value_t: Float[Tensor, "N T"],
    value_tp1: Float[Tensor, "N T"],
    is_terminated_t: Bool[Tensor, "N T"],
    is_done_t: Bool[Tensor, "N T"],
    gamma: int | float,
    gae_lambda: int | float,
) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    """Compute generalised advantage estimates, separately for each environment.

        delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma lambda (1 - done_t) A_{t+1}

    A truncated episode is bootstrapped from the value of its last observation. A terminated one is not. Advantages of
    the next episode never enter either.

    Args:
        reward_t: rewards that followed the actions.
        value_t: V(s_t).
        value_tp1: V(s_{t+1}) of the same episode, also at its last step.
        is_terminated_t: true where the episode terminated.
        is_done_t: true where the episode ended, by termination or truncation.
        gamma: discount in [0, 1].
        gae_lambda: in [0, 1].

    Returns:
        Advantages, and value targets A_t + V(s_t).

    Source: Schulman et al. (2016), equations 11 and 16.
    """
    floats = (reward_t, value_t, value_tp1)
    if all(is_triton(x) for x in floats) and not needs_gradient(floats):
        advantage = generalized_advantage_triton(*floats, is_terminated_t, is_done_t, gamma, gae_lambda)
        return advantage, advantage + value_t
    delta = reward_t + gamma * value_tp1 * (~is_terminated_t) - value_t
    carry = gamma * gae_lambda * (~is_done_t).to(delta.dtype)
    advantage = torch.empty_like(delta)
    running = torch.zeros_like(delta[:, 0])
    for t in range(delta.shape[1] - 1, -1, -1):
        running = torch.addcmul(delta[:, t], carry[:, t], running)
        advantage[:, t] = running
    return advantage, advantage + value_t


def masked_standardize(
    x: Float[Tensor, "*B"], mask: Bool[Tensor, "*B"] | None = None, min_std: int | float = 1e-6
) -> Float[Tensor, "*B"]:
    """Return `x`, shifted and scaled to mean 0 and standard deviation 1 over the entries where `mask` is true.

    Entries outside the mask are shifted and scaled by the same numbers. Without a mask all entries count. A standard
    deviation below `min_std` counts as `min_std`.
    """
    kept = x if mask is None else x[mask]
    if kept.numel() < 2:
        return x
    return (x - kept.mean()) / kept.std().clamp_min(min_std)


def explained_variance(prediction: Float[Tensor, "*B"], target: Float[Tensor, "*B"]) -> Float[Tensor, ""]:
    """Return 1 - Var(target - prediction) / Var(target): 1 is perfect, 0 is no better than the mean."""
    variance = target.var()
    return 1.0 - (target - prediction).var() / variance.clamp_min(torch.finfo(variance.dtype).eps ** 2)
