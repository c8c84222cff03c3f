"""Replay: run a policy again over recorded steps to recompute its memory states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl import keys
from cyborg_torchrl.modules.actor_critic import PPOAgent


@torch.no_grad()
def state_after(
    policy: TensorDictModuleBase, steps: TensorDictBase, state: TensorDictBase, state_keys: Sequence[NestedKey]
) -> TensorDictBase:
    """Return the memory state after a batch of sequences, without gradient.

    Args:
        policy: a `PPOAgent`, or any policy that writes its states under "next" (TorchRL's do).
        steps: observations and `is_init`, [B, T], T >= 1.
        state: the state before the first step, [B].
        state_keys: the entries that are memory states.

    Returns:
        The state after the last step, [B], under the same keys.
    """
    device, home = next((p.device for p in policy.parameters()), steps.device), state.device
    steps, state = steps.to(device), state.to(device)
    work = steps.exclude(*state_keys, keys.NEXT)
    for key in state.keys(include_nested=True, leaves_only=True):
        value = state.get(key)
        work.set(key, value.unsqueeze(1).expand(-1, steps.shape[1], *value.shape[1:]))
    if isinstance(policy, PPOAgent):
        last = TensorDict(policy.run_memories(work), steps.batch_size[:1])
    else:
        last = _by_steps(policy, work, state_keys)
    return last if home is None else last.to(home)


def memory_state_keys(policy: TensorDictModuleBase) -> list[NestedKey]:
    """Return the memory states of a policy: the entries that it reads, and writes again under "next"."""
    written = {unravel_key(key) for key in policy.out_keys}
    return [key for key in map(unravel_key, policy.in_keys) if unravel_key((keys.NEXT, key)) in written]


def acting_policy(actor: TensorDictModuleBase, critic: TensorDictModuleBase | None) -> TensorDictModuleBase:
    """Return the actor, followed by the critic if the critic has a memory that the actor does not carry."""
    if critic is None or not set(memory_state_keys(critic)) - set(memory_state_keys(actor)):
        return actor
    return TensorDictSequential(actor, critic)


def as_primed(states: TensorDictBase, is_init: Tensor) -> TensorDictBase:
    """Return states [B] as a rollout has them: zero in rows where an episode begins, [B] or [B, 1].

    Zero is the value that a primer writes at a reset. TorchRL's modules read it there.
    """
    flags = is_init.reshape(-1)
    if not bool(flags.any()):
        return states
    return states.apply(lambda value: value.masked_fill(flags.view(-1, *[1] * (value.ndim - 1)), 0.0))


def with_states(sequences: TensorDictBase, states: TensorDictBase, *, zero_after_resets: bool = True) -> TensorDictBase:
    """Set states [B] at every step of sequences [B, S], as a view, and zero from the first later reset on.

    Our backbone reads only the state of the first step. TorchRL's modules also read it at every reset, where their
    primer writes zero.

    Args:
        sequences: steps with `is_init`; changed in place.
        states: the states before the first steps.
        zero_after_resets: False: leave the view as it is, for a policy of our backbones.
    """
    steps = sequences.shape[1]
    is_later_episode: Tensor | None = None
    if zero_after_resets:
        is_later_episode = sequences.get(keys.IS_INIT).squeeze(-1)[:, 1:].cumsum(1) > 0
        is_later_episode = is_later_episode if bool(is_later_episode.any()) else None

    def spread(state: Tensor) -> Tensor:
        everywhere = state.unsqueeze(1).expand(-1, steps, *state.shape[1:])
        if is_later_episode is None:
            return everywhere
        mask = is_later_episode.view(*is_later_episode.shape, *[1] * (state.ndim - 1))
        return torch.cat([everywhere[:, :1], everywhere[:, 1:].masked_fill(mask, 0.0)], 1)

    for key in states.keys(include_nested=True, leaves_only=True):
        sequences.set(key, spread(states.get(key)))
    return sequences


def _by_steps(policy: TensorDictModuleBase, work: TensorDictBase, state_keys: Sequence[NestedKey]) -> TensorDictBase:
    """Run step by step, as in acting, which is right for any policy."""
    carried = work.select(*state_keys, strict=False)[:, 0]
    inputs = work.exclude(*state_keys)
    with set_recurrent_mode(False), set_exploration_type(ExplorationType.DETERMINISTIC):  # draws no random numbers
        for t in range(work.shape[1]):
            step = inputs[:, t]
            played = policy(step.update(as_primed(carried, step.get(keys.IS_INIT))))
            carried = played.get(keys.NEXT).select(*state_keys, strict=False)
    return carried.clone()
