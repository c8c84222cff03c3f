"""TensorDict modules: encoders, the backbone, the agent."""

from cyborg_torchrl.modules.action_heads import ActionHead, MultiDiscrete, NormalHead, build_action_head
from cyborg_torchrl.modules.actor_critic import ActionEvaluation, PPOAgent
from cyborg_torchrl.modules.backbone import Backbone
from cyborg_torchrl.modules.encoders import GridEncoder, MixedEncoder, PixelEncoder, VectorEncoder, build_encoder
from cyborg_torchrl.modules.fusion import PastPresentFusion

__all__ = [
    "ActionEvaluation",
    "ActionHead",
    "Backbone",
    "GridEncoder",
    "MixedEncoder",
    "MultiDiscrete",
    "NormalHead",
    "PPOAgent",
    "PastPresentFusion",
    "PixelEncoder",
    "VectorEncoder",
    "build_action_head",
    "build_encoder",
]
