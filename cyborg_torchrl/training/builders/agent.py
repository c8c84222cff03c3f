"""Build the agent and the objective of a configuration."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchrl.envs import EnvBase

from cyborg_torchrl.config import ConfigError, resolve_device
from cyborg_torchrl.cores import Core, MemorylessCore
from cyborg_torchrl.envs.make import episode_attribute
from cyborg_torchrl.envs.transforms.normalization import statistics_of
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder
from cyborg_torchrl.objectives import RecurrentClipPPOLoss
from cyborg_torchrl.registry import Registry, backbones, memories, options_of
from cyborg_torchrl.training.builders.environment import builder_options


def memory_horizon(cfg: DictConfig, env: EnvBase) -> int:
    """Return the number of steps that memory is built to bridge.

    This is the environment's horizon. Without one it is train.n_steps, or else the longest episode, or else 1000.
    """
    horizon = episode_attribute(env, "horizon") or cfg.train.n_steps or episode_attribute(env, "max_episode_steps")
    return max(1, horizon or 1000)


def build_core(cfg: DictConfig, in_features: int, env: EnvBase) -> Core:
    """Build the core of a configuration. `max_horizon: null` becomes `memory_horizon`.

    Raises:
        ConfigError: if the backbone or the memory refuses its options.
    """
    horizon = memory_horizon(cfg, env)

    def build(node: DictConfig, registry: Registry, first: Any, group: str) -> Core:
        builder, options = registry.get(node.name), builder_options(node)
        if "max_horizon" in options_of(builder) and options.get("max_horizon") is None:
            options["max_horizon"] = horizon
        try:
            return builder(first, **options)
        except ValueError as error:
            raise ConfigError(f"{group}: {error}") from None

    core = build(cfg.memory, memories, build(cfg.backbone, backbones, in_features, "backbone"), "memory")
    return MemorylessCore(core) if cfg.train.recurrent_mode == "none" else core


def build_agent(cfg: DictConfig, env: EnvBase) -> PPOAgent:
    """Build the agent for an environment. Its parameters depend on torch's global seed.

    Raises:
        ConfigError: if the encoder, the core or the environment does not fit.
    """
    batch_dims = len(env.batch_size)
    try:
        encoder = build_encoder(env.observation_spec, batch_dims=batch_dims, **OmegaConf.to_container(cfg.encoder))
    except ValueError as error:
        raise ConfigError(f"encoder: {error}") from None
    core = build_core(cfg, cfg.encoder.features, env)
    try:
        agent = PPOAgent(
            encoder,
            Backbone(core),
            env.action_spec,
            batch_dims=batch_dims,
            is_gated=cfg.fusion.gate,
            value_scale=0.1 if cfg.train.vf_coef else 0.0,  # an untrained critic must return zero
            env_statistics=statistics_of(env),
        )
    except ValueError as error:
        raise ConfigError(f"env: {error}") from None
    return agent.to(resolve_device(cfg.train.device))


def build_loss(cfg: DictConfig, agent: PPOAgent) -> RecurrentClipPPOLoss:
    """Build the objective for an agent."""
    train = cfg.train
    return RecurrentClipPPOLoss(
        agent,
        clip_epsilon=train.clip_range,
        clip_value=train.clip_range_vf,
        critic_coeff=train.vf_coef,
        entropy_coeff=train.ent_coef,
        entropy_bonus=train.ent_coef != 0.0,
        loss_critic_type="l2",
        normalize_advantage=train.normalize_advantage == "minibatch",
        log_explained_variance=False,
    )
