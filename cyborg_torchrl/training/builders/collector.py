"""From configuration to collector: in this process, in several, or on a Ray cluster."""

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
    """Builds the collector; it adds the primers of the memory state to the environment by itself."""
    num_envs = env.batch_size.numel()
    frames = num_envs * steps
    options = {
        "frames_per_batch": frames,
        "total_frames": frames * max(1, cfg.train.total_timesteps // frames),
    }
    cudagraph = cfg.collector.cudagraph
    if cfg.collector.name == "rollout":
        collector = RolloutCollector(env, agent, **options, **_kept(agent, buffer, env))
    elif cfg.collector.name in ("single", "fused"):
        kind = Collector if cfg.collector.name == "single" else partial(FusedCollector, cudagraph=cudagraph)
        try:
            collector = kind(env, agent, auto_register_policy_transforms=True, **options)
        except ValueError as error:
            if not cudagraph:
                raise
            raise ConfigError(f"collector.cudagraph: {error}") from None
    elif cfg.collector.name == "ray":
        options |= _kept(agent, buffer, env)
        options["state_steps"] = partial(_same_steps, buffer.state_steps(steps))  # the buffer stays here
        collector = _ray_collector(cfg, agent, _share_of_worker(cfg, num_envs), options)
    else:
        share = _share_of_worker(cfg, num_envs)
        seeds = range(cfg.train.seed, cfg.train.seed + cfg.collector.num_workers)
        makers = [partial(build_env, cfg, num_envs=share, seed=seed) for seed in seeds]
        collector = MultiSyncCollector(makers, agent, cat_results=0, auto_register_policy_transforms=True, **options)
    collector.set_seed(cfg.train.seed)
    return collector


def _ray_collector(cfg: DictConfig, agent: PPOAgent, num_envs: int, options: dict[str, Any]) -> RayRolloutCollector:
    """Builds the collector on a Ray cluster, with so many environments for each worker."""
    node, elsewhere = cfg.collector, OmegaConf.create(OmegaConf.to_container(cfg))
    elsewhere.train.device = "cuda" if node.num_gpus else "cpu"
    maker = partial(_build_env_elsewhere, elsewhere, environments.get(cfg.env.name), num_envs)
    shares = {"num_workers": node.num_workers, "num_cpus": node.num_cpus, "num_gpus": node.num_gpus}
    try:
        cluster = RayCluster(node.address, **shares)
    except ClusterError as error:
        raise ConfigError(f"collector: {error}") from None
    options |= {"seed": cfg.train.seed, "device": resolve_device(cfg.train.device)}
    return RayRolloutCollector([maker] * node.num_workers, agent, cluster=cluster, **options)


def _same_steps(at: list[int], steps: int) -> list[int]:
    del steps
    return at


def _build_env_elsewhere(cfg: DictConfig, builder: Callable[..., EnvBase], num_envs: int, seed: int) -> EnvBase:
    """`build_env` in a process that does not know what a script has registered."""
    if cfg.env.name not in environments.names():
        environments.register(cfg.env.name)(builder)
    return build_env(cfg, num_envs=num_envs, seed=seed)


def _kept(agent: PPOAgent, buffer: Buffer, env: EnvBase) -> dict[str, Any]:
    """What our collectors keep: states where the buffer needs them, and nothing that no update reads."""
    twice = [unravel_key((keys.NEXT, key)) for key in agent.encoder.in_keys]
    unread = (keys.SUCCESS, keys.EPISODE_REWARD)
    return {
        "value_operator": agent.get_value_operator(),
        "state_steps": buffer.state_steps,
        "exclude_keys": [*twice, *agent.policy_head.out_keys, *(key for key in unread if key in env.observation_spec)],
    }


def _share_of_worker(cfg: DictConfig, num_envs: int) -> int:
    """Environments of each of a collector's processes; raises ConfigError for what cannot be split over them."""
    _check_statistics(cfg)
    workers = cfg.collector.num_workers
    if cfg.env.get("workers"):
        raise ConfigError(
            f"env.workers and collector={cfg.collector.name} both start processes: use env.workers=0, or "
            "collector=rollout."
        )
    if num_envs % workers:
        raise ConfigError(f"collector.num_workers = {workers} does not divide env.num_envs = {num_envs}.")
    return num_envs // workers


def _check_statistics(cfg: DictConfig) -> None:
    """What keeps one statistic over all environments."""
    for key in ("normalize_observation", "normalize_reward"):
        if cfg.transforms[key]:
            raise ConfigError(
                f"transforms.{key} keeps one statistic over all environments, which the parts of collector="
                f"{cfg.collector.name} do not share: use collector=rollout, with env.workers if there is such a key."
            )
