"""The dataclasses that own the defaults, the limits and the descriptions of all options.

The options of a backbone or an environment are the keyword parameters of its registered builder. Their dataclasses are
made from its signature.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, OmegaConf

from cyborg_torchrl.registry import backbones, environments, memories, option_types, options_of


def option(default: Any, **limits: Any) -> Any:
    """Return a field with limits, which `validate` checks.

    Args:
        default: the default value. None is always allowed if it is the default.
        **limits: `above` and `minimum` (numbers), `interval` (two numbers, both included), `choices` (texts), or
            `belongs_to` (the modes or collectors that use the option; with all others only the default is allowed).
    """
    return field(default=default, metadata=limits)


@dataclass
class EncoderConfig:
    """The encoder: from observations to features."""

    features: int = option(64, above=0)
    """Size of the features."""
    hidden_sizes: list[int] | None = field(default=None, metadata={"above": 0})
    """Sizes of the layers before the features. null: by the preset."""
    observation_keys: list[str] | None = None
    """Observations to read; nested keys with dots. null: "pixels" if there are any, else "observation", else all.
    "previous_action", "previous_reward" and "first_step" are always read if they exist."""
    convolutions: str = option("auto", choices=("auto", "small", "nature", "impala"))
    """Network for pictures: small (3 convolutions of 3 x 3), nature (3 larger ones; sides of 36 or more), impala (15,
    slow), or auto: small if the shorter side has at most 48 pixels, else nature."""
    grids: list[str] | None = None
    """Observations that are grids of object numbers, such as MiniGrid's; nested keys with dots. Other bytes with sides
    of 8 or more are pictures. null: arrays [H, W, C] of bytes with a side below 28 are grids, larger ones pictures."""
    discrete: str = option("one_hot", choices=("one_hot", "embedding"))
    """Encoding of categories: one_hot, or embedding (learned)."""
    embedding_size: int = option(16, above=0)
    """Size of the embedding of a category, or of a number in a grid such as MiniGrid's."""
    autocast: str | None = None
    """bfloat16 or float16: the encoder computes in this precision, both when acting and when training. Its features
    and all memory stay float32. Faster for pictures, if the processor has instructions for it. null: float32."""


@dataclass
class FusionConfig:
    """How features of the present and of memory are combined."""

    gate: bool | None = None
    """Let the present gate memory, so that a question can select what to recall. null: by the preset."""


@dataclass
class AgentConfig:
    """The heads of the agent, and its critic."""

    policy_hidden_sizes: list[int] | None = field(default=None, metadata={"above": 0})
    """Sizes of the hidden layers of the policy head. null: by the preset."""
    value_hidden_sizes: list[int] | None = field(default=None, metadata={"above": 0})
    """Sizes of the hidden layers of the value head. null: by the preset."""
    separate_critic: bool | None = None
    """Give the critic its own encoder and memory. The critic then costs as much as the actor. null: by the preset."""
    std_from_features: bool = False
    """Compute the standard deviation of continuous actions from the features. false: one parameter for each action."""
    log_std_init: float | None = None
    """Logarithm of the first standard deviation of continuous actions, in units of half their range. null: by the
    preset."""
    squash: bool = False
    """Squash continuous actions into their bounds by tanh. false: actions beyond the bounds are clipped."""
    action_mask: str | None = "action_mask"
    """Entry that marks the valid actions of categorical choices, if the environment has it. Nested keys with dots.
    null: all actions are valid."""


@dataclass
class InitFromConfig:
    """The parameters with which a new run begins."""

    path: str | None = None
    """A run's folder (its best checkpoint, or else its last one), or a checkpoint. The new run may have another
    configuration, if its networks have the same shapes. init_from=... is short for init_from.path=..."""
    only: list[str] | None = None
    """Parts to load, such as [encoder,backbone]: encoder, backbone, fusion, policy_head, value_head, critic,
    env_statistics. Longer names and * select less: [backbone.core.layers.0]. null: all parts."""
    statistics: bool = True
    """Load the normalisation statistics too: those of observations with the encoder, of rewards with the value head."""
    optimizer: bool = False
    """Load the optimiser's state too. It needs all parts."""


@dataclass
class TrainConfig:
    """PPO."""

    total_timesteps: int = option(200_000, above=0)
    """Environment steps in total. As many whole rollouts are collected as fit, and at least one."""
    stop_at: float | None = None
    """End training once the score reaches this value: success_rate, or mean_reward if the task reports no success. The
    score is the evaluation's with logger.eval_every, else that of an update's own episodes. null: never."""
    n_steps: int | None = option(None, above=0)
    """Steps of each environment in a rollout. null: by the preset general 128; else, and with recurrent_mode=episode,
    one full episode if the environment knows its length."""
    recurrent_mode: str | None = option(None, choices=("none", "burn_in", "tbptt", "episode"))
    """burn_in: chunks of seq_len from stored states, after burn_in replayed steps. tbptt: the same without replay.
    episode: whole episodes. none: the control, the same agent without memory; it ignores the options of the others.
    null: by the preset."""
    burn_in: int = option(0, minimum=0, belongs_to=("burn_in",))
    """Steps replayed without gradient before each chunk (mode burn_in)."""
    seq_len: int | None = option(None, above=0, belongs_to=("burn_in", "tbptt"))
    """Steps in a chunk, and the reach of the gradient (modes burn_in and tbptt). null: by the preset general half of
    n_steps; else the whole rollout."""
    state_stride: int | None = option(None, above=0, belongs_to=("burn_in", "tbptt"))
    """Steps for each stored state, a multiple of seq_len (modes burn_in and tbptt). null: seq_len."""
    state_dtype: str = option("float32", choices=("float32", "bfloat16", "float16"), belongs_to=("burn_in", "tbptt"))
    """Precision of stored states: float32, bfloat16 or float16."""
    start_state: str = option("stored", choices=("stored", "initial"), belongs_to=("burn_in", "tbptt"))
    """State that a chunk starts from: stored, or initial. initial is wrong, but common; it is here for comparison."""
    refresh_states: bool = option(False, belongs_to=("burn_in", "tbptt"))
    """Recompute the stored states with the current parameters before each epoch except the first."""
    storage: str | None = option(None, choices=("ram", "memmap", "device"))
    """Storage of the rollout: ram, memmap (files in a temporary folder), or device (the one of train.device). null:
    device on a GPU, else ram."""
    n_epochs: int | None = option(None, above=0)
    """Passes over each rollout. null: by the preset."""
    num_minibatches: int | None = option(None, above=0)
    """Minibatches in a pass. They split environments or chunks, never the order of time. null: by the preset."""
    micro_batch_steps: int | None = option(None, above=0)
    """Steps of a minibatch that pass through the network at once. The gradients of larger minibatches are added up from
    parts, except with normalize_advantage=minibatch or a core that has its own loss. null: 32,768 on a CPU, no limit on
    a GPU."""
    cudagraph: bool | None = None
    """Replay each optimiser step as a CUDA graph: one launch instead of hundreds, with the same results. null: on a
    GPU, in one process."""
    learning_rate: float | None = option(None, above=0)
    """Step size of the optimiser. null: by the preset."""
    lr_schedule: str = option("linear", choices=("constant", "linear", "cosine"))
    """linear or cosine (to zero over the run, so that a solved task stays solved), or constant."""
    desired_kl: float | None = option(None, minimum=0)
    """The learning rate is divided by 1.5 after an update whose last KL exceeds twice this value, and multiplied by 1.5
    after one below half of it, up to that of the schedule. 0: never. null: by the preset."""
    optimizer: str = option("adam", choices=("adam", "adamw", "rmsprop"))
    """Optimiser: adam, adamw (with weight_decay) or rmsprop."""
    weight_decay: float = option(0.0, minimum=0)
    """Decay of the parameters in a step, relative to the learning rate (adamw)."""
    adam_eps: float = option(1e-5, above=0)
    """Epsilon of the optimiser."""
    gamma: float | None = option(None, interval=[0, 1])
    """Discount factor. null: by the preset."""
    gae_lambda: float | None = option(None, interval=[0, 1])
    """Lambda of generalised advantage estimation. null: by the preset."""
    clip_range: float = option(0.2, above=0)
    """Clip range of the probability ratio."""
    clip_range_vf: float | None = option(None, above=0)
    """Clip range of the change of the value. null: no clipping."""
    vf_coef: float = option(0.5, minimum=0)
    """Weight of the critic's loss. 0: no critic, and all values are zero. The baseline of a return is then its mean
    over the environments at that step, if gae_lambda=1 and normalize_advantage=step."""
    ent_coef: float | None = option(None, minimum=0)
    """Weight of the entropy bonus. null: by the preset."""
    max_grad_norm: float = option(0.5, above=0)
    """Largest norm of the gradient; larger gradients are scaled down."""
    target_kl: float | None = option(None, above=0)
    """An update stops early when an epoch's KL exceeds 1.5 times this value. null: never."""
    normalize_advantage: str = option("rollout", choices=("rollout", "step", "minibatch", "none"))
    """Set of advantages that get mean 0 and standard deviation 1: rollout, minibatch, or none. step: first subtract the
    mean over the environments at each step. This baseline knows the time, for tasks whose episodes start together."""
    freeze: list[str] = field(default_factory=list)
    """Parts of the agent that are not trained, such as [encoder,backbone]. Names are those of init_from.only."""
    seed: int = option(0, minimum=0, below=2**63)
    """Seed of parameters, actions and environments."""
    device: str = "cpu"
    """cpu, cuda, cuda:N, or auto: CUDA if it is available."""
    num_threads: int = option(1, above=0)
    """CPU threads of torch. Small networks are fastest with one."""


@dataclass
class TransformsConfig:
    """Transforms between the environment and the agent."""

    previous_action: bool = False
    """Show the previous action as "previous_action": one-hot, or scaled to [-1, 1]; zero at an episode's first step."""
    previous_reward: bool = False
    """Show the previous reward as "previous_reward", unscaled; zero at an episode's first step."""
    first_step: bool = False
    """Show a flag as "first_step", 1 at an episode's first step and 0 after it."""
    frame_stack: int = option(1, above=0)
    """Number of consecutive observations that are concatenated. 1: only the current one."""
    normalize_observation: bool | None = None
    """Normalise float observations by their running mean and standard deviation, clipped to [-10, 10]. The statistics
    are saved with the agent. null: by the preset."""
    reward_scale: float = option(1.0, above=0)
    """Multiply rewards by this number. mean_reward stays raw."""
    normalize_reward: bool | None = None
    """Divide rewards by the running standard deviation of the discounted return. mean_reward stays raw. null: by the
    preset."""
    clip_reward: float | None = option(None, above=0)
    """Clip rewards to [-clip_reward, clip_reward], after normalisation. null: no clipping."""
    noise_steps: float | None = option(None, minimum=1)
    """Steps over which the exploration noise of continuous actions is correlated, so that an agent explores in one
    direction for some steps. 1: independent noise at each step. null: by the preset."""


@dataclass
class CollectorConfig:
    """How rollouts are collected."""

    name: str = option("rollout", choices=("rollout", "fused", "single", "multi_sync", "ray"))
    """rollout: in this process, without a memory state for every step. single: TorchRL's, in this process. fused: the
    same, stepped on tensors. multi_sync: env.num_envs split over worker processes. ray: env.num_envs split over
    workers on a Ray cluster; lost workers are replaced."""
    num_workers: int = option(2, above=0)
    """Processes of multi_sync, workers of ray."""
    cudagraph: bool | None = option(None, belongs_to=("rollout", "fused"))
    """Replay the policy's step as a CUDA graph (rollout, fused): the same batches in less than half the time.
    Environment and networks must be on train.device=cuda. null: where they are."""
    address: str | None = option(None, belongs_to=("ray",))
    """Ray cluster: auto (the one that runs on this machine) or ip:port. null: a new one, on this machine."""
    num_cpus: float = option(1.0, minimum=0)
    """CPUs, or a share of one, that each worker of ray requests. It uses the same number of threads."""
    num_gpus: float = option(0.0, minimum=0)
    """GPUs, or a share of one, that each worker of ray requests. 0: it computes on the CPU."""


@dataclass
class LoggerConfig:
    """The files of a run, its metrics and its evaluation."""

    base_dir: str = "runs"
    """Folder of all runs."""
    run_name: str | None = None
    """Folder of this run. null: task, backbone, seed and time."""
    resume: str | None = None
    """Run to continue. auto: the run of run_name, or else the newest unfinished run of this configuration; a new run if
    there is none. A run's folder: that run, with its configuration. A checkpoint: the same training from there on, in a
    new folder. resume=... is short for logger.resume=... To change environments or networks, use init_from."""
    keep_checkpoints: int = option(3, above=0)
    """How many of the last checkpoints are kept, in addition to the best."""
    checkpoint_every: int = option(1, above=0)
    """Updates between two checkpoints."""
    tensorboard: bool = True
    """Write TensorBoard files into the run's folder."""
    backends: list[str] = field(default_factory=list, metadata={"choices": ("wandb", "mlflow")})
    """More loggers of metrics: wandb, mlflow."""
    project: str = "cyborg_torchrl"
    """Project of W&B, experiment of MLflow."""
    offline: bool = False
    """W&B writes only into the run's folder; `wandb sync` uploads it later."""
    tracking_uri: str | None = None
    """Server of MLflow, database (sqlite:///FILE), or a database's folder. null: base_dir."""
    profile: bool = False
    """Write profile/table.txt and profile/trace.json.gz into the run's folder: where the time of two updates goes."""
    progress: bool = True
    """Show a progress bar on stderr."""
    eval_episodes: int = option(1000, minimum=0)
    """Fresh episodes after training. 0: none."""
    eval_every: int | None = option(None, minimum=0)
    """Updates between two evaluations during training, on separate environments. best.pt is then the evaluated update
    with the highest score. null or 0: none."""
    eval_every_episodes: int = option(100, above=0)
    """Fresh episodes of each evaluation during training."""
    eval_max_steps: int | None = option(None, above=0)
    """Steps after which each episode of an evaluation is cut. null: the longest episode of the environment, but at
    least 10,000; an environment whose episode was cut then plays no more."""
    eval_actions: str = option("greedy", choices=("greedy", "sampled"))
    """Actions of the evaluation: greedy, or sampled as in training. A greedy walker can run against a wall for ever."""


GROUPS = {"backbone": backbones, "memory": memories, "env": environments}
"""Groups whose choices are registered components."""
NODES = {
    "encoder": EncoderConfig,
    "fusion": FusionConfig,
    "agent": AgentConfig,
    "transforms": TransformsConfig,
    "init_from": InitFromConfig,
    "train": TrainConfig,
    "collector": CollectorConfig,
    "logger": LoggerConfig,
}
SHORT_KEYS = {"id": "env.id", "resume": "logger.resume", "init_from": "init_from.path"}
"""Overrides that have a short form."""
REMOVED_KEYS = (("collector", "groups"), ("collector", "is_graphed"))
"""Options of older versions. They are ignored in the configuration of an old run."""


@dataclass
class Config:
    """A whole experiment: one choice of each group."""

    env: Any = MISSING
    backbone: Any = MISSING
    preset: str = "auto"
    """Values of the options that are null: memory_task (whole episodes, many epochs, large steps), general (any other
    task), or auto: memory_task for the memory tasks of this package, else general."""
    memory: Any = field(default_factory=lambda: {"name": "none"})
    """An external memory around the backbone: none or pmm."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    transforms: TransformsConfig = field(default_factory=TransformsConfig)
    init_from: InitFromConfig = field(default_factory=InitFromConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    collector: CollectorConfig = field(default_factory=CollectorConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    imports: list[str] = field(default_factory=list)
    """Modules, or .py files, that register environments and backbones. --import NAME adds one."""


def config_class_of(name: str, builder: Callable[..., Any]) -> type:
    """Return the dataclass of a registered builder's options, with the field `name` first."""
    hints = option_types(builder)
    fields: list[tuple[str, Any, Any]] = [("name", str, field(default=name))]
    for key, default in options_of(builder).items():
        fields.append((key, _node_type(hints.get(key, Any)), _node_default(default)))
    return dataclasses.make_dataclass(f"{name.title().replace('_', '')}Config", fields)


def _node_type(hint: Any) -> Any:
    """Return an annotation that OmegaConf supports: sequences become lists, mappings become Any."""
    origin = typing.get_origin(hint)
    if any(part is dict or typing.get_origin(part) is dict for part in (hint, *typing.get_args(hint))):
        return Any  # Hydra cannot merge keys into a typed mapping
    return list[typing.get_args(hint)[0]] if origin in (Sequence, tuple) else hint


def _node_default(default: Any) -> Any:
    if default is inspect.Parameter.empty:
        return field(default=MISSING)
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: list(default))
    if isinstance(default, dict):
        return field(default_factory=lambda: OmegaConf.create(dict(default), flags={"struct": False}))
    return field(default=default)
