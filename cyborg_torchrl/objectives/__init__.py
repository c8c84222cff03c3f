"""Objectives: loss mathematics, advantages, and the recurrent PPO loss."""

from cyborg_torchrl.objectives.advantages import add_advantages, value_after
from cyborg_torchrl.objectives.drift import measure_drift
from cyborg_torchrl.objectives.functional import explained_variance, generalized_advantage, masked_standardize
from cyborg_torchrl.objectives.recurrent_ppo import RecurrentClipPPOLoss

__all__ = [
    "RecurrentClipPPOLoss",
    "add_advantages",
    "explained_variance",
    "generalized_advantage",
    "masked_standardize",
    "measure_drift",
    "value_after",
]
