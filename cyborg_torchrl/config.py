"""Configuration: dataclasses own the defaults, YAML lists differences, wrong input ends in one clear line.

The options of a backbone or an environment are the keyword parameters of its registered builder; their typed nodes
are made from its signature.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import math
import tempfile
import typing
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cyborg_torchrl.config_errors import explain
from cyborg_torchrl.registry import (
    Registry,
    UnknownNameError,
    backbones,
    did_you_mean,
    environments,
    memories,
    options_of,
    signature_owner,
)

LOGGER = logging.getLogger(__name__)
DEFAULT_CONFIG = "memory_delayed_cue_recurrent"
RECURRENT_MODES = ("none", "burn_in", "tbptt", "episode")
STATE_DTYPES = ("float32", "bfloat16", "float16")
STORAGES = ("ram", "memmap", "device")
BACKENDS = ("wandb", "mlflow")


class ConfigError(ValueError):
    """Configuration that cannot be used; the message is one line that says what is wrong and what would be right."""


@dataclass
class EncoderConfig:
    """From observations to features."""

    features: int = 64
    """Width of the embedding."""
    hidden_sizes: list[int] = field(default_factory=list)
    """Layers before it."""
    observation_keys: list[str] | None = None
    """What to read, nested keys with dots; null: "pixels" if there are any, else "observation", else everything.
    "previous_action" and "previous_reward" are read in any case where they are there."""
    convolutions: str = "impala"
    """Network of pictures: impala (15 convolutions) or nature (3: faster)."""
    discrete: str = "one_hot"
    """How categories are read: one_hot or embedding (learned)."""
    embedding_size: int = 16
    """Width of the embedding of a category, or of a number in a grid such as MiniGrid's."""
    autocast: str | None = None
    """bfloat16 or float16: the encoder computes in it, acting and training; its features and all that remembers stay
    float32. Worth it for pictures. null: float32."""


@dataclass
class FusionConfig:
    """Where the present meets what memory reads."""

    gate: bool = False
    """Let the present gate the past, so that a question can choose among what is remembered."""


@dataclass
class TrainConfig:
    """PPO."""

    total_timesteps: int = 200_000
    """Environment steps in all; whole rollouts that fit into it are collected, and at least one."""
    n_steps: int | None = None
    """Steps of each environment in a rollout; null: one full episode, where the environment knows its length, else
    128."""
    recurrent_mode: str = "none"
    """none: no memory, the control. burn_in: chunks of seq_len from stored states, after burn_in replayed steps.
    tbptt: the same without replay. episode: whole episodes."""
    burn_in: int = 0
    """Steps replayed without gradient before each chunk (mode burn_in)."""
    seq_len: int | None = None
    """Steps in a chunk (modes burn_in and tbptt), and the reach of the gradient; null: the whole rollout."""
    state_stride: int | None = None
    """Steps for each stored state, a multiple of seq_len (modes burn_in and tbptt); null: seq_len."""
    state_dtype: str = "float32"
    """Precision of stored states: float32, bfloat16 or float16."""
    start_state: str = "stored"
    """What a chunk begins with: stored, or initial (as most libraries have it: wrong, and here for comparison)."""
    refresh_states: bool = False
    """Recompute the stored states with the present parameters before each epoch but the first."""
    storage: str = "ram"
    """Where the rollout is kept: ram, memmap (files in a temporary folder), or device (that of train.device)."""
    n_epochs: int = 15
    """Passes over each rollout."""
    num_minibatches: int = 8
    """Minibatches in a pass; they split environments or chunks, never the order of time."""
    micro_batch_steps: int | None = 32_768
    """Steps of a minibatch that go through the network at once; larger minibatches in parts, whose gradients add up to
    the same (not with normalize_advantage=minibatch, nor with a core that has a loss of its own). null: no limit."""
    learning_rate: float = 3e-3
    lr_schedule: str = "linear"
    """linear (to zero over the run; a solved task stays solved) or constant."""
    adam_eps: float = 1e-5
    gamma: float = 0.999
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    clip_range_vf: float | None = None
    """Clip of the value's change; null: none."""
    vf_coef: float = 0.5
    """Weight of the critic's loss; 0: no critic, values are zero (with gae_lambda=1 and normalize_advantage=step the
    baseline of a return is its mean over the environments at that step)."""
    ent_coef: float = 0.0
    max_grad_norm: float = 0.5
    target_kl: float | None = None
    """An update stops early when an epoch's KL exceeds 1.5 times this; null: never."""
    normalize_advantage: str = "rollout"
    """Over what advantages get mean 0 and standard deviation 1: rollout, minibatch, none (not at all), or step: the
    mean over the environments at each step is taken off first, a baseline that knows the time, for tasks whose episodes
    begin together."""
    seed: int = 0
    device: str = "cpu"
    """cpu, cuda, cuda:N, or auto: CUDA where it is."""
    num_threads: int = 1
    """CPU threads of torch; small networks are fastest with one."""


@dataclass
class TransformsConfig:
    """What stands between the environment and the agent; all off by default."""

    previous_action: bool = False
    """Show the previous action as "previous_action": one-hot, or scaled to [-1, 1]; zero at an episode's first step."""
    previous_reward: bool = False
    """Show the previous reward as "previous_reward", as the environment gave it; zero at an episode's first step."""
    frame_stack: int = 1
    """Observations of so many steps side by side; 1: only the present one."""
    normalize_observation: bool = False
    """Float observations by their running mean and standard deviation, clipped to [-10, 10]; kept with the agent."""
    normalize_reward: bool = False
    """Rewards by the running standard deviation of the discounted return; mean_reward stays raw."""
    clip_reward: float | None = None
    """Rewards to [-clip_reward, clip_reward], after normalisation; null: not."""


@dataclass
class CollectorConfig:
    """How rollouts are collected."""

    name: str = "rollout"
    """rollout: in this process, without a memory state for every step. single: TorchRL's in this process. fused: the
    same, stepped on tensors. multi_sync: env.num_envs split over worker processes. overlapped: env.num_envs split into
    groups, the policy acting for one while another steps, in env.workers processes where there are some. ray:
    env.num_envs split over workers on a Ray cluster; those that die are replaced."""
    num_workers: int = 2
    """Processes of multi_sync, workers of ray."""
    groups: int = 2
    """Groups of overlapped."""
    address: str | None = None
    """The cluster of ray: auto (the one that runs on this machine) or ip:port; null: one of this run's own, here."""
    num_cpus: float = 1.0
    """CPUs, or a share of one, that each worker of ray asks for; it computes with as many threads."""
    num_gpus: float = 0.0
    """GPUs, or a share of one, that each worker of ray asks for; 0: it computes on the CPU."""


@dataclass
class LoggerConfig:
    """What a run leaves behind."""

    base_dir: str = "runs"
    """Folder of all runs."""
    run_name: str | None = None
    """Folder of this run; null: task, backbone, seed and time."""
    resume: str | None = None
    """Go on with a run that was cut short. auto: the one of run_name, or else the newest of this configuration that is
    not done; a new one if there is none. A path: that run's folder, with its configuration, or one of its checkpoints,
    which begins a new run. resume=... is short for logger.resume=..."""
    keep_checkpoints: int = 3
    """How many of the last checkpoints are kept, beside the best."""
    checkpoint_every: int = 1
    """Updates between two checkpoints."""
    tensorboard: bool = True
    backends: list[str] = field(default_factory=list)
    """Where metrics go as well: wandb, mlflow."""
    project: str = "cyborg_torchrl"
    """Project of W&B, experiment of MLflow."""
    offline: bool = False
    """W&B writes into the run's folder alone; `wandb sync` uploads it later."""
    tracking_uri: str | None = None
    """Server of MLflow, database (sqlite:///FILE), or folder of one; null: base_dir."""
    progress: bool = True
    """Show a progress bar on stderr."""
    eval_episodes: int = 1000
    """Fresh episodes after training; 0: none."""
    eval_actions: str = "greedy"
    """What is done in them: greedy, or sampled as while training (a greedy walker can run against a wall for ever)."""


GROUPS = {"backbone": backbones, "memory": memories, "env": environments}
"""Groups whose choices are registered components."""
NODES = {
    "encoder": EncoderConfig,
    "fusion": FusionConfig,
    "transforms": TransformsConfig,
    "train": TrainConfig,
    "collector": CollectorConfig,
    "logger": LoggerConfig,
}
SHORT_KEYS = {"id": "env.id", "resume": "logger.resume"}
"""Overrides that may be written short."""


@dataclass
class Config:
    """A whole experiment: one choice of each group."""

    env: Any = MISSING
    backbone: Any = MISSING
    memory: Any = field(default_factory=lambda: {"name": "none"})
    """An external memory around the backbone: none or pmm."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    transforms: TransformsConfig = field(default_factory=TransformsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    collector: CollectorConfig = field(default_factory=CollectorConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


def config_class_of(name: str, builder: Callable[..., Any]) -> type:
    """Makes the dataclass of a registered builder's options, with the field `name` first."""
    hints = typing.get_type_hints(signature_owner(builder))
    options = options_of(builder).items()
    fields = [(key, _node_type(hints.get(key, Any)), _node_default(default)) for key, default in options]
    return dataclasses.make_dataclass(
        f"{name.title().replace('_', '')}Config", [("name", str, field(default=name)), *fields]
    )


def _node_type(hint: Any) -> Any:
    """The annotation that OmegaConf knows: sequences are lists; null or a mapping is anything, to be filled later."""
    origin = typing.get_origin(hint)
    if any(typing.get_origin(part) is dict for part in typing.get_args(hint)):
        return Any  # Hydra cannot merge keys into a typed mapping
    return list[typing.get_args(hint)[0]] if origin in (Sequence, tuple) else hint  # pyright: ignore


def _node_default(default: Any) -> Any:
    if default is inspect.Parameter.empty:
        return field(default=MISSING)
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: list(default))  # pyright: ignore[reportUnknownLambdaType]
    return field(default=default)


def config_dir() -> Path:
    """Folder of the shipped YAML files: inside an installed wheel, or at the top of a checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def load_config(config: str = DEFAULT_CONFIG, overrides: Sequence[str] = ()) -> DictConfig:
    """Composes and checks a configuration.

    Args:
        config: name of a shipped configuration, or path of a YAML file: with a `defaults` list it is a Hydra
            configuration of its own (the shipped groups are found from there too); without, it is laid over the
            default one, so it may hold a few keys, or all of them, as a run's `config.yaml` does.
        overrides: Hydra overrides, such as "backbone=gru", "env.horizon=200"; "id=..." stands for "env.id=...".

    Raises:
        ConfigError: with one line that says what is wrong and what would be right.
    """
    GlobalHydra.instance().clear()
    try:
        with (
            primary_config(config, overrides) as primary,
            initialize_config_dir(str(primary.folder), version_base="1.3"),
        ):
            cfg = compose(primary.name, primary.overrides)
            OmegaConf.resolve(cfg)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explained(error, config, overrides) from None
    validate(cfg)
    return cfg


class Primary(NamedTuple):
    """What Hydra composes a configuration from."""

    folder: Path
    name: str
    overrides: list[str]


@contextmanager
def primary_config(config: str, overrides: Sequence[str]) -> Generator[Primary]:
    """Makes ready for Hydra what `load_config` composes; a file without a `defaults` list lasts as long as the context.

    Raises:
        ConfigError: if there is no such configuration, or it cannot be read.
    """
    _store_nodes()
    overrides = [_written_out(override) for override in overrides]
    folder, name = _locate(config)
    if folder == config_dir():
        yield Primary(folder, name, overrides)
        return
    with tempfile.TemporaryDirectory() as scratch:
        complete = _lay_over_default(folder / name, overrides)
        if complete is not None:
            folder, name = Path(scratch), "config"
            OmegaConf.save(complete, folder / "config.yaml")
        yield Primary(folder, name, [*overrides, f"hydra.searchpath=[file://{config_dir()}]"])


def explained(error: Exception, config: str, overrides: Sequence[str]) -> ConfigError:
    """What Hydra or OmegaConf raised while composing, as one line."""
    folder, name = _locate(config)
    shipped = name if folder == config_dir() else DEFAULT_CONFIG
    written = [_written_out(override) for override in overrides]
    return ConfigError(explain(error, written, _choices, partial(_recompose, shipped)))


def validate(cfg: DictConfig) -> None:
    """Checks what types alone cannot.

    Raises:
        ConfigError: at the first impossible value.
    """
    _check_keys(cfg)
    train: TrainConfig = cfg.train
    for group in ("train", "transforms"):
        for key, value in cfg[group].items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{group}.{key} must be a finite number; got {value}.")
    for key in ("vf_coef", "ent_coef", "burn_in", "seed"):
        if cfg.train[key] < 0:
            raise ConfigError(f"train.{key} must be 0 or more; got {cfg.train[key]}.")
    if train.seed >= 2**63:
        raise ConfigError(f"train.seed must be less than 2^63; got {train.seed}.")
    if any(size < 1 for size in cfg.encoder.hidden_sizes):
        raise ConfigError(f"encoder.hidden_sizes must be greater than 0; got {list(cfg.encoder.hidden_sizes)}.")
    for key in ("num_cpus", "num_gpus"):
        if not 0.0 <= cfg.collector[key] < math.inf:
            raise ConfigError(f"collector.{key} must be a finite number, 0 or more; got {cfg.collector[key]}.")
    if cfg.collector.address is not None and cfg.collector.name != "ray":
        raise ConfigError(f"collector.address belongs to collector=ray; the collector is '{cfg.collector.name}'.")
    positive = {
        "train.adam_eps": train.adam_eps,
        "train.total_timesteps": train.total_timesteps,
        "train.n_epochs": train.n_epochs,
        "train.num_minibatches": train.num_minibatches,
        "train.learning_rate": train.learning_rate,
        "train.max_grad_norm": train.max_grad_norm,
        "train.clip_range": train.clip_range,
        "train.num_threads": train.num_threads,
        "env.num_envs": cfg.env.get("num_envs", 1),
        "encoder.features": cfg.encoder.features,
        "encoder.embedding_size": cfg.encoder.embedding_size,
        "collector.num_workers": cfg.collector.num_workers,
        "collector.groups": cfg.collector.groups,
        "logger.keep_checkpoints": cfg.logger.keep_checkpoints,
        "logger.checkpoint_every": cfg.logger.checkpoint_every,
        "transforms.frame_stack": cfg.transforms.frame_stack,
    }
    optional = {"train.n_steps": train.n_steps, "train.seq_len": train.seq_len, "train.target_kl": train.target_kl}
    optional |= {"train.clip_range_vf": train.clip_range_vf, "train.state_stride": train.state_stride}
    optional |= {"train.micro_batch_steps": train.micro_batch_steps}
    optional |= {"transforms.clip_reward": cfg.transforms.clip_reward}
    for key, value in {**positive, **{k: v for k, v in optional.items() if v is not None}}.items():
        if value <= 0:
            raise ConfigError(f"{key} must be greater than 0; got {value}.")
    for key, value in (("gamma", train.gamma), ("gae_lambda", train.gae_lambda)):
        if not 0.0 <= value <= 1.0:
            raise ConfigError(f"train.{key} must lie in [0, 1]; got {value}.")
    options = cfg.env.get("options")
    if options is not None and not isinstance(options, DictConfig):
        raise ConfigError(f"env.options must be a mapping, as in 'env.options={{g: 5.0}}'; got {options!r}.")
    if cfg.logger.eval_episodes < 0:
        raise ConfigError(f"logger.eval_episodes must be 0 or more; got {cfg.logger.eval_episodes}.")
    for key, value, known in (
        ("train.recurrent_mode", train.recurrent_mode, RECURRENT_MODES),
        ("train.normalize_advantage", train.normalize_advantage, ("rollout", "step", "minibatch", "none")),
        ("train.lr_schedule", train.lr_schedule, ("constant", "linear")),
        ("train.state_dtype", train.state_dtype, STATE_DTYPES),
        ("train.storage", train.storage, STORAGES),
        ("train.start_state", train.start_state, ("stored", "initial")),
        ("collector.name", cfg.collector.name, ("rollout", "fused", "single", "multi_sync", "overlapped", "ray")),
        ("encoder.convolutions", cfg.encoder.convolutions, ("impala", "nature")),
        ("logger.eval_actions", cfg.logger.eval_actions, ("greedy", "sampled")),
        ("encoder.discrete", cfg.encoder.discrete, ("one_hot", "embedding")),
    ):
        if value not in known:
            raise ConfigError(f"unknown {key} '{value}': {did_you_mean(value, known)}")
    for backend in cfg.logger.backends:
        if backend not in BACKENDS:
            raise ConfigError(f"unknown logger.backends '{backend}': {did_you_mean(backend, BACKENDS)}")
    _check_mode(train)
    resolve_device(train.device)


def _check_mode(train: Any) -> None:
    """What belongs to another mode than the chosen one is refused, not ignored."""
    mode = train.recurrent_mode
    belongs = {
        "burn_in": (train.burn_in, ("burn_in",)),
        "seq_len": (train.seq_len, ("burn_in", "tbptt")),
        "state_stride": (train.state_stride, ("burn_in", "tbptt")),
        "refresh_states": (train.refresh_states, ("burn_in", "tbptt")),
        "start_state": (train.start_state != "stored", ("burn_in", "tbptt")),
        "state_dtype": (train.state_dtype != "float32", ("burn_in", "tbptt")),
    }
    for key, (value, modes) in belongs.items():
        if value and mode not in modes:
            raise ConfigError(f"train.{key} belongs to recurrent_mode={' or '.join(modes)}; the mode is '{mode}'.")
    if mode == "tbptt" and train.seq_len is None:
        raise ConfigError("train.seq_len must be given with recurrent_mode=tbptt: how far a gradient reaches back.")
    if train.state_stride and train.seq_len is None:
        raise ConfigError("train.state_stride needs train.seq_len: it is a multiple of it.")
    if train.state_stride and train.seq_len and train.state_stride % train.seq_len:
        nearest = max(1, round(train.state_stride / train.seq_len)) * train.seq_len
        raise ConfigError(
            f"train.state_stride = {train.state_stride} must be a multiple of train.seq_len = {train.seq_len}; the "
            f"nearest is {nearest}."
        )
    if train.refresh_states and train.state_stride and train.state_stride != train.seq_len:
        raise ConfigError("train.refresh_states needs a stored state for each chunk: leave train.state_stride out.")


def _written_out(override: str) -> str:
    key, equals, value = override.partition("=")
    return f"{SHORT_KEYS.get(key, key)}{equals}{value}"


def _lay_over_default(stem: Path, overrides: Sequence[str]) -> DictConfig | None:
    """A file without a `defaults` list as the configuration that it stands for; None for one that has such a list.

    Raises:
        ConfigError: if the file cannot be read as a mapping.
    """
    path = next(path for path in (stem.with_suffix(".yaml"), stem.with_suffix(".yml")) if path.is_file())
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"cannot read '{path}': {' '.join(str(error).split())}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"'{path}' must hold keys and values, such as 'train: {{seed: 1}}'.")
    if "defaults" in content:
        return None
    defaults: list[Any] = [DEFAULT_CONFIG]
    for override in overrides:
        content.pop(override.split("=")[0], None)  # a choice of a group, which replaces the file's
    for group in (*GROUPS, *NODES):
        chosen: Any = content.get(group)
        name = chosen.get("name") if group in GROUPS and isinstance(chosen, DictConfig) else chosen
        if isinstance(name, str):
            defaults.append({f"override /{group}": name})
            if isinstance(chosen, str):
                content.pop(group)
    return OmegaConf.merge({"defaults": [*defaults, "_self_"]}, content)  # pyright: ignore[reportReturnType]


def _check_keys(cfg: DictConfig) -> None:
    """Hydra's + and ~ can add and remove keys behind the schema's back; nothing reads them, so they are mistakes."""
    for group in (*GROUPS, *NODES):
        is_there = group in cfg and not OmegaConf.is_missing(cfg, group) and isinstance(cfg[group], DictConfig)
        if not is_there or (group in GROUPS and "name" not in cfg[group]):
            raise ConfigError(f"'{group}' is missing from the configuration; it must choose one of its options.")
    known = {group: [f.name for f in dataclasses.fields(node)] for group, node in NODES.items()}
    for group, registry in GROUPS.items():
        try:
            known[group] = ["name", *options_of(registry.get(cfg[group].name))]
        except UnknownNameError as error:
            raise ConfigError(str(error)) from None
    for group, names in known.items():
        for key in cfg[group]:
            if key not in names:
                raise ConfigError(f"unknown key '{group}.{key}': {did_you_mean(str(key), names)}")


def resolve_device(name: str) -> torch.device:
    """Turns "cpu", "cuda", "cuda:1" or "auto" into a device that is there.

    Raises:
        ConfigError: if it is not.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"train.device '{name}' is not a device; use cpu, cuda, cuda:N or auto.") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"train.device '{name}' is not supported; use cpu, cuda, cuda:N or auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"train.device is '{name}', but torch sees {torch.cuda.device_count()} CUDA devices here; use cpu or auto."
        )
    return device


def _store_nodes() -> None:
    store = ConfigStore.instance()
    store.store(name="config_schema", node=Config)
    for group, node in NODES.items():
        store.store(group=group, name=f"{group}_schema", node=node)
    for group, registry in GROUPS.items():
        for name in _registered(registry):
            try:
                node = config_class_of(name, registry.get(name))
            except Exception as error:  # whatever an installed package does: the other components still work
                LOGGER.warning("%s '%s' cannot be used: %s: %s", group, name, type(error).__name__, error)
                continue
            has_file = (config_dir() / group / f"{name}.yaml").is_file()
            store.store(group=group, name=f"{name}_schema" if has_file else name, node=node)


def _registered(registry: Registry) -> tuple[str, ...]:
    for package in ("cores", "envs"):  # importing them registers the shipped components
        importlib.import_module(f"cyborg_torchrl.{package}")
    return registry.names()


def _locate(config: str) -> tuple[Path, str]:
    path = Path(config)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"no configuration file '{config}'; shipped: {', '.join(_shipped())}.")
        return path.resolve().parent, path.stem
    if config not in _shipped():
        raise ConfigError(f"no configuration '{config}': {did_you_mean(config, _shipped())}")
    return config_dir(), config


def _shipped() -> list[str]:
    return sorted(path.stem for path in config_dir().glob("*.yaml"))


def _choices(group: str) -> list[str]:
    registry = GROUPS.get(group)
    shipped = [path.stem for path in (config_dir() / group).glob("*.yaml")]
    return sorted({*shipped, *(registry.names() if registry else ())})


def _recompose(config: str, overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(config, list(overrides))
