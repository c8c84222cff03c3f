# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (tensordict's and torchrl's annotations are narrower than what they take)
"""From configuration to objects: the sole wiring."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict.utils import unravel_key
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.data import LazyMemmapStorage, LazyTensorStorage
from torchrl.envs import EnvBase

from cyborg_torchrl import keys
from cyborg_torchrl.collectors import FusedCollector, OverlappedCollector, RayRolloutCollector, RolloutCollector
from cyborg_torchrl.collectors.ray_cluster import ClusterError, RayCluster
from cyborg_torchrl.config import ConfigError, TrainConfig, resolve_device
from cyborg_torchrl.cores import Core, MemorylessCore
from cyborg_torchrl.data import EpisodeBuffer, RecurrentRolloutBuffer, RolloutBuffer
from cyborg_torchrl.distributed import Ranks
from cyborg_torchrl.envs.make import episode_attribute, tracked
from cyborg_torchrl.envs.normalization import statistics_of
from cyborg_torchrl.envs.transforms import build_transforms
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder
from cyborg_torchrl.objectives import RecurrentClipPPOLoss
from cyborg_torchrl.process import prepare_cpu
from cyborg_torchrl.registry import Registry, backbones, environments, memories, options_of
from cyborg_torchrl.trainer import PPOTrainer

DEFAULT_STEPS = 128
"""Steps of a rollout where neither the configuration nor the environment says how many."""
Buffer = RolloutBuffer | RecurrentRolloutBuffer | EpisodeBuffer


def prepare_process(cfg: DictConfig) -> None:
    """Sets threads, denormals, allocator and seeds of this process."""
    prepare_cpu(cfg.train.num_threads)
    torch.manual_seed(cfg.train.seed)


def build_env(
    cfg: DictConfig, *, num_envs: int | None = None, seed: int | None = None, workers: int | None = None
) -> EnvBase:
    """Builds the environment of a configuration, batched, with `is_init`, episode returns and its transforms.

    Episode returns are raw: nothing that changes rewards comes before them.

    Args:
        cfg: the configuration.
        num_envs: in place of env.num_envs.
        seed: in place of train.seed.
        workers: in place of env.workers.

    Raises:
        ConfigError: if the environment refuses its options.
    """
    options = _options(cfg.env)
    options["num_envs"] = options.get("num_envs", 1) if num_envs is None else num_envs
    if workers is not None:
        options["workers"] = workers
    seed = cfg.train.seed if seed is None else seed
    try:
        env = environments.get(cfg.env.name)(**options, device=resolve_device(cfg.train.device), seed=seed)
    except ValueError as error:
        raise ConfigError(f"env: {error}") from None
    try:
        transforms = build_transforms(env, gamma=cfg.train.gamma, **OmegaConf.to_container(cfg.transforms))
    except ValueError as error:
        raise ConfigError(f"transforms: {error}") from None
    return tracked(env, transforms)


def memory_horizon(cfg: DictConfig, env: EnvBase) -> int:
    """Steps that memory is built to bridge: the environment's horizon.

    Where it has none: the steps of a rollout, else the longest episode.
    """
    horizon = episode_attribute(env, "horizon") or cfg.train.n_steps or episode_attribute(env, "max_episode_steps")
    return max(1, horizon or 1000)


def build_core(cfg: DictConfig, in_features: int, env: EnvBase) -> Core:
    """Builds the core of a configuration; `max_horizon: null` becomes what `memory_horizon` says."""
    horizon = memory_horizon(cfg, env)

    def build(node: DictConfig, registry: Registry, first: Any, group: str) -> Core:
        builder, options = registry.get(node.name), _options(node)
        if "max_horizon" in options_of(builder) and options.get("max_horizon") is None:
            options["max_horizon"] = horizon
        try:
            return builder(first, **options)
        except ValueError as error:
            raise ConfigError(f"{group}: {error}") from None

    core = build(cfg.memory, memories, build(cfg.backbone, backbones, in_features, "backbone"), "memory")
    return MemorylessCore(core) if cfg.train.recurrent_mode == "none" else core


def build_agent(cfg: DictConfig, env: EnvBase) -> PPOAgent:
    """Builds the agent that fits an environment; seeded by train.seed."""
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
            value_scale=0.1 if cfg.train.vf_coef else 0.0,  # a critic that nobody trains says zero
            env_statistics=statistics_of(env),
        )
    except ValueError as error:
        raise ConfigError(f"env: {error}") from None
    return agent.to(resolve_device(cfg.train.device))


def rollout_length(cfg: DictConfig, env: EnvBase) -> int:
    """Steps of each environment in a rollout, checked against the minibatches.

    Raises:
        ConfigError: if it has fewer sequences than there are minibatches.
    """
    train = cfg.train
    steps = train.n_steps or episode_attribute(env, "max_episode_steps") or DEFAULT_STEPS
    num_envs = env.batch_size.numel()
    row = _row_length(cfg, steps, env)
    rows = num_envs * -(-steps // (row if row == steps else train.state_stride or row))
    if train.num_minibatches > rows:
        raise ConfigError(
            f"train.num_minibatches = {train.num_minibatches}, but a rollout has only {rows} sequences to split; use "
            f"{rows} or fewer."
        )
    return steps


def build_buffer(cfg: DictConfig, env: EnvBase, steps: int) -> Buffer:
    """Builds the buffer that the recurrent mode needs."""
    train, num_envs = cfg.train, env.batch_size.numel()
    row = _row_length(cfg, steps, env)
    batch_size = -(-num_envs * -(-steps // row) // train.num_minibatches)
    if train.recurrent_mode == "none":
        return RolloutBuffer(num_envs * steps, batch_size, storage=_storage(cfg, num_envs * steps))
    if train.recurrent_mode == "episode":
        rows = num_envs + 2 * -(-num_envs * steps // row)
        return EpisodeBuffer(num_envs * steps, row, batch_size, num_envs=num_envs, storage=_storage(cfg, rows))
    stride = steps if row == steps else train.state_stride or row
    dtype = None if train.state_dtype == "float32" else getattr(torch, train.state_dtype)
    return RecurrentRolloutBuffer(
        num_envs * steps,
        row,
        batch_size,
        num_envs=num_envs,
        burn_in=train.burn_in,
        state_stride=stride,
        state_dtype=dtype,
        start_state=train.start_state,
        storage=_storage(cfg, num_envs * -(-steps // min(stride, row * -(-steps // row)))),
    )


def _storage(cfg: DictConfig, rows: int) -> LazyTensorStorage:
    if cfg.train.storage == "memmap":
        return LazyMemmapStorage(rows)
    return LazyTensorStorage(rows, device=resolve_device(cfg.train.device) if cfg.train.storage == "device" else "cpu")


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
    if cfg.collector.name == "rollout":
        collector = RolloutCollector(env, agent, **options, **_kept(agent, buffer, env))
    elif cfg.collector.name in ("single", "fused"):
        kind = FusedCollector if cfg.collector.name == "fused" else Collector
        collector = kind(env, agent, auto_register_policy_transforms=True, **options)
    elif cfg.collector.name == "overlapped":
        collector = OverlappedCollector(_groups(cfg, env), agent, **options, **_kept(agent, buffer, env))
    elif cfg.collector.name == "ray":
        options |= _kept(agent, buffer, env)
        options["keyframe_steps"] = partial(_same_steps, buffer.keyframe_steps(steps))  # the buffer stays here
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
        "keyframe_steps": buffer.keyframe_steps,
        "exclude_keys": [*twice, *agent.policy_head.out_keys, *(key for key in unread if key in env.observation_spec)],
    }


def _groups(cfg: DictConfig, env: EnvBase) -> list[EnvBase]:
    """The environments of a configuration in several groups, each with its share of the processes."""
    groups, num_envs, workers = cfg.collector.groups, env.batch_size.numel(), cfg.env.get("workers")
    _check_statistics(cfg)
    for key, value in (("env.num_envs", num_envs), ("env.workers", workers or 0)):
        if value % groups:
            raise ConfigError(f"collector.groups = {groups} does not divide {key} = {value}.")
    share = workers // groups if workers else None
    return [build_env(cfg, num_envs=num_envs // groups, seed=cfg.train.seed + i, workers=share) for i in range(groups)]


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


def build_loss(cfg: DictConfig, agent: PPOAgent) -> RecurrentClipPPOLoss:
    """Builds the objective."""
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


class Training(NamedTuple):
    """What a training run needs."""

    trainer: PPOTrainer
    agent: PPOAgent
    env: EnvBase


RANK_SEEDS = 10_007
"""Seeds from one rank to the next: more than a rank has workers or groups."""


def share_of_rank(cfg: DictConfig, ranks: Ranks) -> DictConfig:
    """What one of the processes that train together does of a configuration: a part of the environments and steps.

    Raises:
        ConfigError: if environments, or the processes that they run in, cannot be shared evenly.
    """
    if ranks.size == 1:
        return cfg
    cfg = copy.deepcopy(cfg)
    for key, number in (("num_envs", cfg.env.get("num_envs", 1)), ("workers", cfg.env.get("workers") or 0)):
        if number % ranks.size:
            near = max(1, round(number / ranks.size)) * ranks.size
            raise ConfigError(
                f"env.{key} = {number} cannot be shared evenly by the {ranks.size} processes of this run; the nearest "
                f"that can is {near}."
            )
        if key in cfg.env:
            cfg.env[key] = number // ranks.size
    cfg.train.total_timesteps = max(1, cfg.train.total_timesteps // ranks.size)
    cfg.train.seed += ranks.rank * RANK_SEEDS
    return cfg


def build_trainer(
    cfg: DictConfig, on_progress: Callable[[float], None] = lambda share: None, ranks: Ranks | None = None
) -> Training:
    """Builds everything that a training run needs: the trainer, the agent that it trains, and its environment.

    Args:
        cfg: of the whole run.
        on_progress: see `PPOTrainer`.
        ranks: the processes that train together; each builds its share. None: this one alone.
    """
    ranks = ranks or Ranks()
    cfg = share_of_rank(cfg, ranks)
    prepare_process(cfg)
    # the groups of an overlapped collector have processes of their own
    env = build_env(cfg, workers=0 if cfg.collector.name == "overlapped" and cfg.env.get("workers") else None)
    agent = build_agent(cfg, env)
    steps = rollout_length(cfg, env)
    buffer = build_buffer(cfg, env, steps)
    trainer = PPOTrainer(
        collector=build_collector(cfg, env, agent, steps, buffer),
        loss=build_loss(cfg, agent),
        value_operator=agent.get_value_operator(),
        buffer=buffer,
        config=cast("TrainConfig", OmegaConf.to_object(cfg.train)),
        on_progress=on_progress,
        ranks=ranks,
    )
    return Training(trainer, agent, env)


def _options(node: DictConfig) -> dict[str, Any]:
    """The keyword arguments of a registered builder."""
    return {str(key): value for key, value in OmegaConf.to_container(node).items() if key != "name"}  # pyright: ignore


def _row_length(cfg: DictConfig, steps: int, env: EnvBase) -> int:
    mode = cfg.train.recurrent_mode
    if mode == "none":
        return 1
    if mode == "episode":  # no episode takes more of a rollout than either
        return min(steps, episode_attribute(env, "max_episode_steps") or steps)
    return min(steps, cfg.train.seq_len or steps)
