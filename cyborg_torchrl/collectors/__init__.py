"""Collection."""

from cyborg_torchrl.collectors.fused_collector import FusedCollector
from cyborg_torchrl.collectors.ray_collector import RayRolloutCollector
from cyborg_torchrl.collectors.rollout_collector import RolloutCollector

__all__ = ["FusedCollector", "RayRolloutCollector", "RolloutCollector"]
