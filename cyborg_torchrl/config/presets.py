"""Presets: the values of the options that a configuration leaves open (null).

`load_config` chooses the preset and fills what depends on nothing else. What depends on the environment's observations
and actions is filled by `complete`, when the environment is built. A value that is given is never changed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from tensordict.utils import NestedKey
from torchrl.envs import EnvBase

from cyborg_torchrl.config.schema import TrainConfig
from cyborg_torchrl.envs.make import episode_attribute
from cyborg_torchrl.envs.memory.task import MemoryTask
from cyborg_torchrl.modules.encoders.build import default_observations
from cyborg_torchrl.modules.encoders.images import MIN_SIDE, image_layout
from cyborg_torchrl.registry import environments

PRESETS: dict[str, dict[str, Any]] = {
    "memory_task": {
        "encoder.hidden_sizes": [],
        "fusion.gate": False,
        "agent.policy_hidden_sizes": [],
        "agent.value_hidden_sizes": [],
        "agent.separate_critic": False,
        "agent.log_std_init": 0.0,
        "transforms.normalize_observation": False,
        "transforms.normalize_reward": False,
        "transforms.noise_steps": 1.0,
        "train.recurrent_mode": "episode",
        "train.n_epochs": 15,
        "train.num_minibatches": 8,
        "train.learning_rate": 3e-3,
        "train.desired_kl": 0.0,
        "train.gamma": 0.999,
        "train.gae_lambda": 0.0,  # only the answer is an action; 0.95 learns too, slower
        "train.ent_coef": 0.0,
    },
    "general": {
        "agent.policy_hidden_sizes": [64],
        "agent.value_hidden_sizes": [64],
        "train.recurrent_mode": "tbptt",
        "train.learning_rate": 1e-3,
        "train.desired_kl": 0.02,
    },
}
"""Values by preset, whatever the observations are."""
NUM_STEPS, NUM_MINIBATCHES = 128, 8
LONGEST_WINDOW = 600
"""Longest episode of a memory task that attention reads as a whole."""
LONGEST_SEQUENCE = 320
"""Longest episode of a prediction task that is trained on as one sequence."""
SHOWN = (
    "train.n_steps",
    "train.seq_len",
    "train.n_epochs",
    "train.num_minibatches",
    "train.learning_rate",
    "train.desired_kl",
    "train.gamma",
    "train.gae_lambda",
    "train.ent_coef",
    "transforms.normalize_observation",
    "transforms.normalize_reward",
    "transforms.noise_steps",
    "encoder.hidden_sizes",
    "fusion.gate",
    "agent.policy_hidden_sizes",
    "agent.value_hidden_sizes",
    "agent.separate_critic",
    "agent.log_std_init",
)
"""Options that a run shows at its start."""
OPEN_OPTIONS = frozenset({*PRESETS["memory_task"], *PRESETS["general"], *SHOWN})
"""Options that a preset can fill."""

Kind = Literal["pixels", "vector", "categories"]


def is_memory_task(name: str) -> bool:
    """Return whether a registered environment is one of the memory tasks of this package."""
    builder = environments.get(name) if name in environments.names() else None
    return isinstance(builder, type) and issubclass(builder, MemoryTask)


def choose_preset(cfg: DictConfig) -> None:
    """Name the preset of a configuration, and fill the open options that depend on nothing else, in place."""
    if cfg.preset == "auto":
        cfg.preset = "memory_task" if is_memory_task(cfg.env.name) else "general"
    _fill(cfg, PRESETS[cfg.preset])


def complete(cfg: DictConfig, env: EnvBase) -> None:
    """Fill the options that a preset derives from the environment, in place.

    Args:
        cfg: the configuration; a second call changes nothing.
        env: its environment, without the transforms.
    """
    longest = episode_attribute(env, "max_episode_steps")
    if cfg.preset == "memory_task" and "window" in cfg.backbone and longest is not None and longest <= LONGEST_WINDOW:
        _fill(cfg, {"backbone.window": longest})
    if cfg.preset != "general":
        return
    kind, is_continuous = observation_kind(env), env.action_spec.dtype.is_floating_point
    num_actions = max(1, env.action_spec.shape[-1]) if is_continuous else 1
    is_prediction = bool(episode_attribute(env, "is_prediction"))  # what follows does not depend on the answers
    is_shared = cfg.collector.name in ("rollout", "single", "fused")  # other collectors cannot share statistics
    _fill(
        cfg,
        {
            "encoder.hidden_sizes": [] if kind == "pixels" else [64],
            "fusion.gate": kind == "categories",  # a question may choose what to recall
            "transforms.normalize_observation": kind == "vector" and is_shared,
            "transforms.normalize_reward": is_shared,
            "transforms.noise_steps": 3.0 if is_continuous and num_actions == 1 else 1.0,
            "agent.separate_critic": kind == "vector",
            "agent.log_std_init": round(math.log(1 / num_actions), 2),
            "train.n_epochs": 8 if is_prediction else 5 if kind == "vector" else 4,
            "train.gamma": 0.5 if is_prediction else 0.995 if num_actions > 1 else 0.99,  # motors: a robot may fall
            "train.gae_lambda": 0.5 if is_prediction else 0.95,
            "train.ent_coef": 0.0 if is_continuous else 0.01,
        },
    )
    train = cfg.train
    is_short = is_prediction and longest is not None and longest <= LONGEST_SEQUENCE
    if is_short and "window" in cfg.backbone:
        _fill(cfg, {"backbone.window": longest})
    if train.recurrent_mode != "episode":
        _fill(cfg, {"train.n_steps": longest if is_short else NUM_STEPS})
    if train.recurrent_mode in ("burn_in", "tbptt"):
        _fill(cfg, {"train.seq_len": min(longest if is_short else NUM_STEPS // 2, train.n_steps)})
    sequences = cfg.env.get("num_envs") or env.batch_size.numel()
    if train.recurrent_mode != "episode":  # the control gets as many minibatches as an agent with memory
        sequences *= max(1, train.n_steps // (train.seq_len or NUM_STEPS // 2))
    _fill(cfg, {"train.num_minibatches": min(NUM_MINIBATCHES, sequences)})


def describe_preset(cfg: DictConfig, env: EnvBase) -> str:
    """Return one line: the preset, the kind of task, and the values in use, as overrides."""
    actions = "continuous" if env.action_spec.dtype.is_floating_point else "discrete"
    shown = (*SHOWN, "backbone.window") if "window" in cfg.backbone else SHOWN
    values = (f"{key}={str(OmegaConf.select(cfg, key)).lower().replace(' ', '')}" for key in shown)
    return f"preset={cfg.preset} ({observation_kind(env)}, {actions} actions): {' '.join(values)}".replace(
        "none", "null"
    )


def observation_kind(env: EnvBase) -> Kind:
    """Return "pixels" if a picture is read, "vector" if floats are, else "categories" (such as MiniGrid's grid)."""
    spec, batch_dims = env.observation_spec, len(env.batch_size)
    read = default_observations(spec)
    if any(_is_picture(env, key, batch_dims) for key in read):
        return "pixels"
    return "vector" if any(spec[key].dtype.is_floating_point for key in read) else "categories"


def _is_picture(env: EnvBase, key: NestedKey, batch_dims: int) -> bool:
    shape = env.observation_spec[key].shape[batch_dims:]
    if len(shape) not in (3, 4):
        return False
    layout = image_layout(shape)
    return min(layout.height, layout.width) >= MIN_SIDE


def _fill(cfg: DictConfig, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if OmegaConf.select(cfg, key) is None:
            OmegaConf.update(cfg, key, value)


def with_general_values(train: TrainConfig) -> TrainConfig:
    """Return the hyperparameters of a script, where the preset `general` replaces None.

    A script shows no observations here, so epochs are those of floats.
    """
    others = {"n_epochs": 5, "num_minibatches": NUM_MINIBATCHES, "gamma": 0.99, "gae_lambda": 0.95, "ent_coef": 0.0}
    options = ((key.partition("."), value) for key, value in PRESETS["general"].items())
    values = others | {name: value for (group, _, name), value in options if group == "train"}
    return dataclasses.replace(train, **{key: value for key, value in values.items() if getattr(train, key) is None})
