"""Objectives: loss mathematics, advantages, and the recurrent PPO loss."""

from cyborg_torchrl.objectives.advantages import add_advantages
from cyborg_torchrl.objectives.functional import explained_variance, generalized_advantage, masked_standardize
from cyborg_torchrl.objectives.recurrent_ppo import RecurrentClipPPOLoss

__all__ = [
    "RecurrentClipPPOLoss",
    "add_advantages",
    "explained_variance",
    "generalized_advantage",
    "masked_standardize",
]
