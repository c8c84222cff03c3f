"""Collection."""

from cyborg_torchrl.collectors.rollout_collector import RolloutCollector

__all__ = ["RolloutCollector"]
