"""Build the collector of a configuration: in this process, in several, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tensordict.utils import unravel_key
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.envs import EnvBase

from cyborg_torchrl import keys
from cyborg_torchrl.collectors import FusedCollector, RayRolloutCollector, RolloutCollector
from cyborg_torchrl.collectors.ray_cluster import ClusterError, RayCluster
from cyborg_torchrl.config import ConfigError, resolve_device
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.registry import environments
from cyborg_torchrl.training.builders.buffer import Buffer
from cyborg_torchrl.training.builders.environment import build_env


def build_collector(
    cfg: DictConfig, env: EnvBase, agent: PPOAgent, steps: int, buffer: Buffer
) -> RolloutCollector | Any:
    """Build the collector, which adds the primers of the memory state to the environment.

    Args:
        cfg: the configuration.
        env: the environment; `multi_sync` and `ray` build their environments in other processes.
        agent: the policy.
        steps: T, the steps of each environment in a rollout.
        buffer: the buffer, which defines the steps with a stored state.

    Raises:
        ConfigError: if the environments cannot be split over the workers, Ray cannot be reached, or the policy has no
            CUDA graph.
    """
    frames = env.batch_size.numel() * steps
    total_frames = frames * max(1, cfg.train.total_timesteps // frames)
    options: dict[str, Any] = {"frames_per_batch": frames, "total_frames": total_frames}
    name = cfg.collector.name
    if name == "rollout":
        collector = RolloutCollector(env, agent, **options, **_recorded_entries(agent, buffer, env))
    elif name == "single":
        collector = Collector(env, agent, auto_register_policy_transforms=True, **options)
    elif name == "fused":
        collector = _build_fused_collector(cfg, env, agent, options)
    elif name == "ray":
        options |= _recorded_entries(agent, buffer, env)
        options["state_steps"] = partial(_constant, buffer.state_steps(steps))  # the buffer is not sent to the workers
        collector = _build_ray_collector(cfg, agent, _envs_per_worker(cfg, env), options)
    else:
        num_envs = _envs_per_worker(cfg, env)
        seeds = range(cfg.train.seed, cfg.train.seed + cfg.collector.num_workers)
        makers = [partial(build_env, cfg, num_envs=num_envs, seed=seed) for seed in seeds]
        collector = MultiSyncCollector(makers, agent, cat_results=0, auto_register_policy_transforms=True, **options)
    collector.set_seed(cfg.train.seed)
    return collector


def _recorded_entries(agent: PPOAgent, buffer: Buffer, env: EnvBase) -> dict[str, Any]:
    """Return the options that select the entries of a rollout: no entry that an update does not read."""
    next_observations = [unravel_key((keys.NEXT, key)) for key in agent.encoder.in_keys]
    before_step = [key for key in (keys.SUCCESS, keys.EPISODE_REWARD) if key in env.observation_spec]
    return {
        "value_operator": agent.get_value_operator(),
        "state_steps": buffer.state_steps,
        "exclude_keys": [*next_observations, *agent.policy_head.out_keys, *before_step],
    }


def _build_fused_collector(cfg: DictConfig, env: EnvBase, agent: PPOAgent, options: dict[str, Any]) -> FusedCollector:
    cudagraph = cfg.collector.cudagraph
    try:
        return FusedCollector(env, agent, cudagraph=cudagraph, auto_register_policy_transforms=True, **options)
    except ValueError as error:
        if not cudagraph:
            raise
        raise ConfigError(f"collector.cudagraph: {error}") from None


def _build_ray_collector(
    cfg: DictConfig, agent: PPOAgent, num_envs: int, options: dict[str, Any]
) -> RayRolloutCollector:
    """Build the collector on a Ray cluster, with `num_envs` environments for each worker."""
    node = cfg.collector
    worker_cfg = OmegaConf.create(OmegaConf.to_container(cfg))
    worker_cfg.train.device = "cuda" if node.num_gpus else "cpu"
    maker = partial(_build_env_in_worker, worker_cfg, environments.get(cfg.env.name), num_envs)
    try:
        cluster = RayCluster(node.address, num_workers=node.num_workers, num_cpus=node.num_cpus, num_gpus=node.num_gpus)
    except ClusterError as error:
        raise ConfigError(f"collector: {error}") from None
    options |= {"seed": cfg.train.seed, "device": resolve_device(cfg.train.device)}
    return RayRolloutCollector([maker] * node.num_workers, agent, cluster=cluster, **options)


def _constant(value: list[int], steps: int) -> list[int]:
    del steps
    return value


def _build_env_in_worker(cfg: DictConfig, builder: Callable[..., EnvBase], num_envs: int, seed: int) -> EnvBase:
    """Build an environment in another process, which may lack the components that a script has registered."""
    if cfg.env.name not in environments.names():
        environments.register(cfg.env.name)(builder)
    return build_env(cfg, num_envs=num_envs, seed=seed)


def _envs_per_worker(cfg: DictConfig, env: EnvBase) -> int:
    """Return the number of environments of each worker.

    Raises:
        ConfigError: if the environments cannot be split over the workers.
    """
    name, workers, num_envs = cfg.collector.name, cfg.collector.num_workers, env.batch_size.numel()
    for key in ("normalize_observation", "normalize_reward"):
        if cfg.transforms[key]:
            raise ConfigError(
                f"transforms.{key} keeps one statistic over all environments, which the parts of collector="
                f"{name} do not share: use collector=rollout, with env.workers if there is such a key."
            )
    if cfg.env.get("workers"):
        raise ConfigError(
            f"env.workers and collector={name} both start processes: use env.workers=0, or collector=rollout."
        )
    if num_envs % workers:
        raise ConfigError(f"collector.num_workers = {workers} does not divide env.num_envs = {num_envs}.")
    return num_envs // workers
