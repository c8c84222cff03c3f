"""The rollout that the checks examine, collected here or given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import LazyStackedTensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl import keys
from cyborg_torchrl.checks.policy_under_test import States
from cyborg_torchrl.checks.tensordict_policy import TensorDictPolicy

MIN_STEPS = 4


@dataclass(frozen=True)
class Bootstraps:
    """Values that an update used for observations after M steps of a rollout."""

    steps: TensorDictBase
    """The steps before these observations, [M], with their inputs, flags and states."""
    following: TensorDictBase
    """The observations, as inputs of the policy, [M]."""
    value: Tensor
    """The values that were used, [M]."""


@dataclass(frozen=True)
class Rollout:
    """A rollout [N, T] with the entries that the checks need."""

    steps: TensorDictBase
    fresh_state: States
    """The state that the environment gives at a reset, {key: [*shape]}; zero without a reset."""
    is_primed: bool
    """True if every recorded reset came with this state."""
    bootstraps: Bootstraps | None = None
    """Values that the update used for observations after steps of the rollout."""


@torch.no_grad()
def collect(tested: TensorDictPolicy, env: EnvBase, steps: int, seed: int) -> TensorDictBase:
    """Collect a rollout [*env.batch_size, steps]. The environment is seeded; torch's generators do not change.

    Raises:
        ValueError: if there are too few steps.
        KeyError: if the environment has no `is_init` or no memory state; the message says what to add.
    """
    if steps < MIN_STEPS:
        raise ValueError(f"steps must be >= {MIN_STEPS}; got {steps}.")
    with torch.random.fork_rng(), set_exploration_type(ExplorationType.RANDOM), set_recurrent_mode(False):
        env.set_seed(seed)
        torch.manual_seed(seed)
        tensordict = env.reset()
        _check_reset(tested, tensordict)
        rows = []
        for _ in range(steps):
            tensordict, following = env.step_and_maybe_reset(tested.policy(tensordict))
            rows.append(tensordict.clone())
            tensordict = following
        return LazyStackedTensorDict.maybe_dense_stack(rows, -1).contiguous()


def prepare(tested: TensorDictPolicy, rollout: TensorDictBase) -> Rollout:
    """Check a rollout, and return the entries that the checks need, as [N, T].

    Raises:
        ValueError: if it has no time dimension or too few steps.
        KeyError: if an entry is missing; the message says what to add.
    """
    if rollout.ndim == 0 or rollout.shape[-1] < MIN_STEPS:
        raise ValueError(
            f"a rollout has batch size [N, T] with T >= {MIN_STEPS} consecutive steps; got {list(rollout.batch_size)}."
        )
    rollout = rollout.unsqueeze(0) if rollout.ndim == 1 else rollout.reshape(-1, rollout.shape[-1])
    _check_entries(tested, rollout)
    wanted = [*tested.input_keys, tested.is_init_key, *tested.state_keys, tested.action_key, tested.log_prob_key]
    steps = rollout.select(*wanted, (keys.NEXT, keys.REWARD), strict=False).detach().contiguous()
    steps.set(tested.is_init_key, steps.get(tested.is_init_key).reshape(*steps.shape, 1))
    flags = steps.get(tested.is_init_key).squeeze(-1)
    resets = {key: value[flags] for key, value in tested.states_of(steps).items()}
    is_primed = all(bool((value == value[:1]).all()) for value in resets.values())
    fresh = {}
    for key, value in tested.states_of(steps).items():
        has_seen = is_primed and resets[key].shape[0] > 0
        fresh[key] = resets[key][0].clone() if has_seen else torch.zeros_like(value[0, 0])
    return Rollout(steps, fresh, is_primed, _bootstraps(tested, rollout))


def _bootstraps(tested: TensorDictPolicy, rollout: TensorDictBase) -> Bootstraps | None:
    """Return the steps whose next value is recorded, without those that end in a terminal state."""
    value = rollout.get((keys.NEXT, keys.VALUE), None)
    following = rollout.get(keys.NEXT, None)
    if value is None or any(following.get(key, None) is None for key in tested.input_keys):
        return None
    terminated = following.get(keys.TERMINATED, torch.zeros_like(value, dtype=torch.bool))
    rows = ~terminated.reshape(rollout.shape)
    steps = rollout.select(*tested.input_keys, tested.is_init_key, *tested.state_keys, *tested.recorded_keys)
    return Bootstraps(steps[rows], following.select(*tested.input_keys)[rows], value.reshape(rollout.shape)[rows])


def _check_reset(tested: TensorDictPolicy, tensordict: TensorDictBase) -> None:
    if tensordict.get(tested.is_init_key, None) is None:
        raise KeyError(
            f"the environment writes no {tested.is_init_key!r}, which says where episodes begin: add "
            "torchrl.envs.InitTracker() to it."
        )
    missing = [key for key in tested.state_keys if tensordict.get(key, None) is None]
    if missing:
        raise KeyError(
            f"the environment holds no memory state {missing}, so {tested.name} would forget everything at each step: "
            "env.append_transform(torchrl.modules.utils.get_primers_from_module(policy))."
        )


def _check_entries(tested: TensorDictPolicy, rollout: TensorDictBase) -> None:
    _check_reset(tested, rollout)
    missing = [key for key in tested.input_keys if rollout.get(key, None) is None]
    if missing:
        raise KeyError(f"the rollout lacks {missing}, which {tested.name} reads.")
    if rollout.get(tested.action_key, None) is None:
        raise KeyError(f"the rollout has no {tested.action_key!r}: it was not collected with this policy.")
    if rollout.get(tested.log_prob_key, None) is None:
        raise KeyError(
            f"the rollout has no log-prob {tested.log_prob_key!r}, so there is nothing to compare with: build the "
            "policy's probabilistic module with return_log_prob=True."
        )
