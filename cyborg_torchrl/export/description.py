"""The description in an exported file: names, shapes and meanings of inputs and outputs."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tensordict.utils import unravel_key
from torch import Tensor
from torchrl.data import Categorical, MultiCategorical, OneHot, TensorSpec
from torchrl.envs import EnvBase

from cyborg_torchrl import keys
from cyborg_torchrl.envs.rendering import action_names
from cyborg_torchrl.export.streaming_step import dotted
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.registry import environments

METADATA = "cyborg_torchrl"
"""Name of the description: a metadata entry of an ONNX file, or an extra file with `.json` of a torch file."""
MEANINGS = {
    keys.PREVIOUS_ACTION: "the action that led here: one-hot, or clipped and scaled to [-1, 1]; zeros where is_init",
    keys.PREVIOUS_REWARD: "the reward that came with this observation; zero where is_init",
    keys.FIRST_STEP: "1 where is_init, else 0",
}


def describe(cfg: DictConfig, agent: PPOAgent, env: EnvBase) -> dict[str, Any]:
    """Describe an agent's step as a dict for JSON.

    Args:
        cfg: configuration of the agent, which is part of the description.
        agent: the agent.
        env: environment of the agent, without normalisation.
    """
    batch_dims = len(env.batch_size)
    stacked = cfg.transforms.frame_stack
    frames = f"the last {stacked} frames, oldest first, the first of an episode repeated" if stacked > 1 else None
    return {
        "version": version("cyborg-torchrl"),
        "task": environments.title(cfg.env.name, cfg.env),
        "observation": {
            dotted(key): _entry(env.observation_spec[key], batch_dims)
            | {"meaning": MEANINGS.get(unravel_key(key), frames or "as the environment shows it")}
            for key in agent.observed_keys
        },
        "is_init": {"shape": [], "dtype": "bool", "meaning": "an episode begins: memory starts from its initial state"},
        "state": {
            name: _entry(value[0], 0) | {"initial": _numbers(value[0].detach())}
            for name, value in agent.backbone.core.initial_state(1).items()
        },
        "action": _action(env, batch_dims),
        "parameters": list(agent.policy_head.out_keys),
        "config": OmegaConf.to_container(cfg),
    }


def _entry(entry: TensorSpec | Tensor, batch_dims: int) -> dict[str, Any]:
    return {"shape": list(entry.shape[batch_dims:]), "dtype": str(entry.dtype).removeprefix("torch.")}


def _action(env: EnvBase, batch_dims: int) -> dict[str, Any]:
    """Describe the action."""
    spec = env.action_spec
    entry = {**_entry(spec, batch_dims), "names": action_names(env)}
    if isinstance(spec, MultiCategorical):
        sizes = spec.nvec.reshape(-1, spec.nvec.shape[-1])[0].tolist()
        return entry | {"kind": "multi_categorical", "sizes": sizes}
    if isinstance(spec, (Categorical, OneHot)):
        kind = "categorical" if type(spec) is Categorical else "one_hot"
        return entry | {"kind": kind, "sizes": [int(spec.space.n)]}
    low, high = (bound[(0,) * batch_dims].tolist() for bound in (spec.space.low, spec.space.high))
    return entry | {"kind": "continuous", "low": low, "high": high, "meaning": "clip it to [low, high]"}


def _numbers(value: Tensor) -> Any:
    """Return one number if all are equal, else all of them."""
    first = value.flatten()[0].item()
    return first if bool((value == first).all()) else value.tolist()
