"""Build the parts of a training run from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey, unravel_key
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.data import LazyMemmapStorage, LazyTensorStorage
from torchrl.envs import EnvBase

from cyborg_torchrl import keys
from cyborg_torchrl.collectors import FusedCollector, RayRolloutCollector, RolloutCollector
from cyborg_torchrl.collectors.guarded_policy import GuardedPolicy
from cyborg_torchrl.collectors.ray_cluster import RayCluster
from cyborg_torchrl.collectors.runtime import prepare_cpu
from cyborg_torchrl.config import ConfigError, TrainConfig, resolve_device
from cyborg_torchrl.config.device_values import by_device
from cyborg_torchrl.config.imports import import_components
from cyborg_torchrl.config.presets import complete
from cyborg_torchrl.cores import Core, MemorylessCore
from cyborg_torchrl.data import EpisodeBuffer, RecurrentRolloutBuffer, RolloutBuffer
from cyborg_torchrl.data.chunks import ceil_div
from cyborg_torchrl.envs.gym.gym_wrapper import check_wrapper
from cyborg_torchrl.envs.make import episode_attribute, tracked
from cyborg_torchrl.envs.transforms.build import build_transforms
from cyborg_torchrl.envs.transforms.normalization import statistics_of
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder
from cyborg_torchrl.modules.parts import freeze
from cyborg_torchrl.objectives import RecurrentClipPPOLoss
from cyborg_torchrl.registry import Registry, backbones, environments, memories, options_of
from cyborg_torchrl.training.distributed import Ranks, share_of_rank
from cyborg_torchrl.training.trainer import PPOTrainer

DEFAULT_STEPS = 128
"""Steps of a rollout if neither the configuration nor the environment defines them."""
Buffer = RolloutBuffer | RecurrentRolloutBuffer | EpisodeBuffer


@contextmanager
def _refusals(part: str) -> Generator[None]:
    """Raise ConfigError with the name of a part for the ValueError by which it refuses its options."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{part}: {error}") from None


def builder_options(node: DictConfig) -> dict[str, Any]:
    """Return the keyword arguments of a registered builder, from its part of a configuration."""
    return {str(key): value for key, value in OmegaConf.to_container(node).items() if key != "name"}


def build_env(
    cfg: DictConfig, *, num_envs: int | None = None, seed: int | None = None, workers: int | None = None
) -> EnvBase:
    """Build the batched environment of a configuration, with `is_init`, episode returns and its transforms.

    Episode returns are raw: transforms that change rewards come after them. Options that the preset derives from
    observations and actions are filled in `cfg`.

    Args:
        cfg: the configuration.
        num_envs: replaces env.num_envs.
        seed: replaces train.seed.
        workers: replaces env.workers, where there is such a key.

    Raises:
        ConfigError: if the environment refuses its options.
    """
    import_components(cfg.imports)  # this may be another process
    options = builder_options(cfg.env)
    options["num_envs"] = options.get("num_envs", 1) if num_envs is None else num_envs
    if workers is not None and "workers" in options:
        options["workers"] = workers
    seed = cfg.train.seed if seed is None else seed
    with _refusals("env"):
        env = environments.get(cfg.env.name)(**options, device=resolve_device(cfg.train.device), seed=seed)
        check_wrapper(env)
    complete(cfg, env)
    with _refusals("transforms"):
        transforms = build_transforms(env, gamma=cfg.train.gamma, **OmegaConf.to_container(cfg.transforms))
    return tracked(env, transforms)


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
        with _refusals(group):
            return builder(first, **options)

    core = build(cfg.memory, memories, build(cfg.backbone, backbones, in_features, "backbone"), "memory")
    return MemorylessCore(core) if cfg.train.recurrent_mode == "none" else core


def build_agent(cfg: DictConfig, env: EnvBase) -> PPOAgent:
    """Build the agent for an environment. Its parameters depend on torch's global seed.

    Raises:
        ConfigError: if the encoder, the core or the environment does not fit.
    """
    complete(cfg, env)
    batch_dims = len(env.batch_size)
    mask_key = _mask_key(cfg, env)
    masks = [] if mask_key is None else [mask_key]

    def encoder(out_key: str) -> TensorDictModule:
        options = {"batch_dims": batch_dims, "out_key": out_key, "ignored_keys": masks}
        with _refusals("encoder"):
            return build_encoder(env.observation_spec, **options, **OmegaConf.to_container(cfg.encoder))

    actor = encoder(keys.FEATURES), Backbone(build_core(cfg, cfg.encoder.features, env))
    critic = None
    if cfg.agent.separate_critic:
        core = build_core(cfg, cfg.encoder.features, env)
        critic_keys = keys.CRITIC_FEATURES, keys.CRITIC_MEMORY_FEATURES, keys.CRITIC_STATE
        critic = encoder(keys.CRITIC_FEATURES), Backbone(core, *critic_keys)
    options = {str(key): value for key, value in cfg.agent.items() if key not in ("separate_critic", "action_mask")}
    if mask_key is not None:
        options |= {"action_mask": mask_key, "mask_shape": env.observation_spec[mask_key].shape[batch_dims:]}
    if keys.EXPLORATION_NOISE in env.observation_spec.keys():
        options["noise_key"] = keys.EXPLORATION_NOISE
    with _refusals("env"):
        agent = PPOAgent(
            *actor,
            env.action_spec,
            batch_dims=batch_dims,
            critic=critic,
            is_gated=cfg.fusion.gate,
            value_scale=0.1 if cfg.train.vf_coef else 0.0,  # an untrained critic must return zero
            env_statistics=statistics_of(env),
            **options,
        )
    return agent.to(resolve_device(cfg.train.device))


def _mask_key(cfg: DictConfig, env: EnvBase) -> NestedKey | None:
    """Return the entry of the action mask, alone or in a Dict observation; None if the environment has no mask."""
    if cfg.agent.action_mask is None:
        return None
    path = tuple(cfg.agent.action_mask.split("."))
    known = {unravel_key(key) for key in env.observation_spec.keys(True, True)}
    places = [unravel_key(path), unravel_key((keys.OBSERVATION, *path))]
    return next((key for key in places if key in known), None)


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


def rollout_length(cfg: DictConfig, env: EnvBase) -> int:
    """Return T, the steps of each environment in a rollout.

    Raises:
        ConfigError: if a rollout has fewer stored rows than minibatches.
    """
    steps = cfg.train.n_steps or episode_attribute(env, "max_episode_steps") or DEFAULT_STEPS
    _, stored = _row_lengths(cfg, steps, env)
    rows = env.batch_size.numel() * ceil_div(steps, stored)
    if cfg.train.num_minibatches > rows:
        raise ConfigError(
            f"train.num_minibatches = {cfg.train.num_minibatches}, but a rollout has only {rows} sequences to split; "
            f"use {rows} or fewer."
        )
    return steps


def build_buffer(cfg: DictConfig, env: EnvBase, steps: int) -> Buffer:
    """Build the buffer of the recurrent mode, for rollouts of `steps` steps of each environment."""
    train, num_envs = cfg.train, env.batch_size.numel()
    num_steps = num_envs * steps
    row_length, stored_length = _row_lengths(cfg, steps, env)
    batch_size = ceil_div(num_envs * ceil_div(steps, row_length), train.num_minibatches)
    storage = partial(_storage, cfg)
    if train.recurrent_mode == "none":
        return RolloutBuffer(num_steps, batch_size, storage=storage)
    if train.recurrent_mode == "episode":
        return EpisodeBuffer(
            num_steps, row_length, batch_size, num_envs=num_envs, storage=storage, zero_after_resets=False
        )
    return RecurrentRolloutBuffer(
        num_steps,
        row_length,
        batch_size,
        num_envs=num_envs,
        burn_in=train.burn_in,
        state_stride=stored_length,
        state_dtype=None if train.state_dtype == "float32" else getattr(torch, train.state_dtype),
        start_state=train.start_state,
        storage=storage,
        zero_after_resets=False,  # the agent reads the first step's state alone
    )


def _storage(cfg: DictConfig, rows: int) -> LazyTensorStorage:
    device = resolve_device(cfg.train.device)
    place = cfg.train.storage or by_device(device)["storage"]
    if place == "memmap":
        return LazyMemmapStorage(rows)
    return LazyTensorStorage(rows, device=device if place == "device" else "cpu")


def _row_lengths(cfg: DictConfig, steps: int, env: EnvBase) -> tuple[int, int]:
    """Return the steps of a sequence in a minibatch, and those of a stored row, which has one memory state."""
    train = cfg.train
    if train.recurrent_mode == "none":
        return 1, 1
    longest = episode_attribute(env, "max_episode_steps") if train.recurrent_mode == "episode" else train.seq_len
    length = min(steps, longest or steps)
    return length, length if length == steps else train.state_stride or length


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
        entries = _recorded_entries(agent, buffer, env)
        with _refusals("collector.cudagraph") if cfg.collector.cudagraph else nullcontext():
            collector = RolloutCollector(env, agent, cudagraph=cfg.collector.cudagraph, **options, **entries)
    elif name == "single":
        collector = Collector(env, GuardedPolicy(agent), auto_register_policy_transforms=True, **options)
    elif name == "fused":
        with _refusals("collector.cudagraph" if cfg.collector.cudagraph else "collector"):
            collector = FusedCollector(
                env, agent, cudagraph=cfg.collector.cudagraph, auto_register_policy_transforms=True, **options
            )
    elif name == "ray":
        options |= _recorded_entries(agent, buffer, env)
        options["state_steps"] = partial(_constant, buffer.state_steps(steps))  # the buffer is not sent to the workers
        collector = _build_ray_collector(cfg, agent, _envs_per_worker(cfg, env), options)
    else:
        num_envs = _envs_per_worker(cfg, env)
        seeds = range(cfg.train.seed, cfg.train.seed + cfg.collector.num_workers)
        makers = [partial(build_env, cfg, num_envs=num_envs, seed=seed) for seed in seeds]
        options |= {"cat_results": 0, "auto_register_policy_transforms": True}
        collector = MultiSyncCollector(makers, GuardedPolicy(agent), **options)
    collector.set_seed(cfg.train.seed)
    return collector


def _recorded_entries(agent: PPOAgent, buffer: Buffer, env: EnvBase) -> dict[str, Any]:
    """Return the options that select the entries of a rollout: no entry that an update does not read."""
    next_observations = [unravel_key((keys.NEXT, key)) for key in agent.observed_keys]
    unread = (keys.SUCCESS, keys.EPISODE_REWARD, keys.EXPLORATION_NOISE)
    before_step = [key for key in unread if key in env.observation_spec]
    return {
        "value_operator": agent.get_value_operator(),
        "state_steps": buffer.state_steps,
        "exclude_keys": [*next_observations, *agent.policy_head.out_keys, *before_step],
    }


def _build_ray_collector(
    cfg: DictConfig, agent: PPOAgent, num_envs: int, options: dict[str, Any]
) -> RayRolloutCollector:
    """Build the collector on a Ray cluster, with `num_envs` environments for each worker."""
    node = cfg.collector
    worker_cfg = OmegaConf.create(OmegaConf.to_container(cfg))
    worker_cfg.train.device = "cuda" if node.num_gpus else "cpu"
    worker_cfg.imports = []  # the workers get what these modules define, and do not need their files
    maker = partial(_build_env_in_worker, worker_cfg, environments.get(cfg.env.name), num_envs)
    with _refusals("collector"):
        cluster = RayCluster(node.address, num_workers=node.num_workers, num_cpus=node.num_cpus, num_gpus=node.num_gpus)
    for module in import_components(cfg.imports):
        cluster.ray.cloudpickle.register_pickle_by_value(module)
    options |= {"seed": cfg.train.seed, "device": resolve_device(cfg.train.device)}
    return RayRolloutCollector([maker] * node.num_workers, agent, cluster=cluster, **options)


def _constant(value: list[int], _steps: int) -> list[int]:
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


class Training(NamedTuple):
    """The parts of a training run."""

    trainer: PPOTrainer
    agent: PPOAgent
    env: EnvBase


def prepare_process(cfg: DictConfig) -> None:
    """Set this process's threads and allocator as configured, and flush denormals.

    For programs: `build_trainer` and `run_experiment` leave the process as it is.
    """
    prepare_cpu(cfg.train.num_threads)


def build_trainer(
    cfg: DictConfig, on_progress: Callable[[float], None] = lambda share: None, ranks: Ranks | None = None
) -> Training:
    """Build the trainer, its agent and its environment.

    Seeds torch's global generator by `torch.manual_seed(cfg.train.seed)`, so that parameters and actions are
    reproducible. Changes nothing else of the process: threads and denormals are set by `prepare_process`.

    Args:
        cfg: the configuration of the whole run.
        on_progress: see `PPOTrainer`.
        ranks: the processes that train together, each with its share; None: this process alone.

    Raises:
        ConfigError: if a part refuses its options, or the parts do not fit together.
    """
    ranks = ranks or Ranks()
    cfg = share_of_rank(cfg, ranks)
    torch.manual_seed(cfg.train.seed)
    env = build_env(cfg)
    agent = build_agent(cfg, env)
    with _refusals("train.freeze"):
        freeze(agent, cfg.train.freeze)
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
