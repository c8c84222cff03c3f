"""Every tensordict key of the package, once.

TorchRL's own names are used wherever TorchRL has one, so that our parts and its parts read each other's entries.
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

FEATURES: Final = "features"
"""What the encoder makes of the present observation, [*B, T, F]."""
MEMORY_FEATURES: Final = "memory_features"
"""What the backbone reads out of memory, [*B, T, D]."""
JOINT_FEATURES: Final = "joint_features"
"""Past and present, normalised apart and added: what the heads read."""
MEMORY_STATE: Final = "memory_state"
"""The nested TensorDict of memory states, batch first: (MEMORY_STATE, "hidden"), ..."""
MEMORY_METRICS: Final = "memory_metrics"
"""Figures of each step that a core reports, [*B, T, 1]: (MEMORY_METRICS, "write_rate"), ..."""

VALUE: Final = "state_value"
ADVANTAGE: Final = "advantage"
VALUE_TARGET: Final = "value_target"
TRAIN_MASK: Final = ("collector", "mask")
"""Steps that are trained; the key that TorchRL's losses read by themselves."""
BURN_IN: Final = ("collector", "burn_in")
"""Steps that are replayed without gradient before those that are trained."""
LOCATION: Final = ("collector", "location")
"""Environment and step of each step of a rollout, [N, T, 2] int32. It names the place of a number that is not finite."""
