"""The dataclasses that own the defaults, and those that are made of registered builders' signatures.

The options of a backbone or an environment are the keyword parameters of its registered builder; their typed nodes
are made from its signature.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from cyborg_torchrl.registry import (
    backbones,
    environments,
    memories,
    options_of,
    signature_owner,
)

RECURRENT_MODES = ("none", "burn_in", "tbptt", "episode")
STATE_DTYPES = ("float32", "bfloat16", "float16")
STORAGES = ("ram", "memmap", "device")
BACKENDS = ("wandb", "mlflow")


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
    same, stepped on tensors. multi_sync: env.num_envs split over worker processes. ray: env.num_envs split over
    workers on a Ray cluster; those that die are replaced."""
    num_workers: int = 2
    """Processes of multi_sync, workers of ray."""
    cudagraph: bool = False
    """fused replays the policy's step as a CUDA graph: the same batches, in less than half the time; environment and
    networks on train.device=cuda."""
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
    return list[typing.get_args(hint)[0]] if origin in (Sequence, tuple) else hint


def _node_default(default: Any) -> Any:
    if default is inspect.Parameter.empty:
        return field(default=MISSING)
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: list(default))
    return field(default=default)
