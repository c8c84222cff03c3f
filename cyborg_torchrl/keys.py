"""All tensordict keys of the package.

Where TorchRL has a name for an entry, we use that name. So TorchRL's components and ours read the same entries.
"""

from typing import Final

OBSERVATION: Final = "observation"
PIXELS: Final = "pixels"
ACTION: Final = "action"
ACTION_LOG_PROB: Final = "action_log_prob"
IS_INIT: Final = "is_init"
NEXT: Final = "next"
REWARD: Final = "reward"
EPISODE_REWARD: Final = "episode_reward"
DONE: Final = "done"
TERMINATED: Final = "terminated"
TRUNCATED: Final = "truncated"
SUCCESS: Final = "success"
PREVIOUS_ACTION: Final = "previous_action"
PREVIOUS_REWARD: Final = "previous_reward"
FIRST_STEP: Final = "first_step"

FEATURES: Final = "features"
"""Output of the encoder for the current observation, [*B, T, F]."""
MEMORY_FEATURES: Final = "memory_features"
"""Read-out of the backbone's memory, [*B, T, D]."""
JOINT_FEATURES: Final = "joint_features"
"""Input of the heads, [*B, T, D]: past and present, normalised separately and added."""
MEMORY_STATE: Final = "memory_state"
"""The nested TensorDict of memory states, batch first: (MEMORY_STATE, "hidden"), ..."""
CRITIC_FEATURES: Final = "critic_features"
CRITIC_MEMORY_FEATURES: Final = "critic_memory_features"
CRITIC_JOINT_FEATURES: Final = "critic_joint_features"
CRITIC_STATE: Final = "critic_state"
"""The same four entries for a critic with a memory that is not the actor's."""
ACTION_MASK: Final = "action_mask"
"""True for valid actions, [*B, T, n]."""
EXPLORATION_NOISE: Final = "exploration_noise"
"""Standard normal numbers from which continuous actions take their randomness while acting, [*B, A]."""
MEMORY_METRICS: Final = "memory_metrics"
"""Metrics of each step that a core reports, [*B, T, 1]: (MEMORY_METRICS, "write_rate"), ..."""

VALUE: Final = "state_value"
ADVANTAGE: Final = "advantage"
VALUE_TARGET: Final = "value_target"
TRAIN_MASK: Final = ("collector", "mask")
"""Mask of the steps that are trained, [N, T] bool. TorchRL's losses read this key."""
BURN_IN: Final = ("collector", "burn_in")
"""Mask of the burn-in steps, [N, T] bool: they run without gradient before the trained steps."""
LOCATION: Final = ("collector", "location")
"""Environment and step of each step of a rollout, [N, T, 2] int32. It locates numbers that are not finite."""
