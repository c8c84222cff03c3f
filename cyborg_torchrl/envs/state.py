"""What environments are in the middle of, to go on from there in another process.

An environment that can tell has two methods:

- `get_state() -> dict`: of tensors, numbers, texts, lists and dicts.
- `set_state(state) -> Tensor`: [N] bool, which environments could not go back there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchrl.envs import Compose, EnvBase, Transform, TransformedEnv


def environment_state(env: EnvBase) -> dict[str, Any] | None:
    """The state of an environment and its transforms; None if it cannot tell."""
    transforms, base = _layers(env)
    if not hasattr(type(base), "get_state"):
        return None
    return {"base": base.get_state(), "transforms": [transform.state_dict() for transform in transforms]}


def set_environment_state(env: EnvBase, state: Mapping[str, Any]) -> Tensor:
    """Goes back to a state of `environment_state`.

    Returns:
        [N] bool, which environments could not, and have to be reset.

    Raises:
        ValueError: if it is the state of another environment.
    """
    transforms, base = _layers(env)
    if len(state["transforms"]) != len(transforms) or not hasattr(type(base), "set_state"):
        raise ValueError("the state is that of another environment.")
    for transform, saved in zip(transforms, state["transforms"], strict=True):
        transform.load_state_dict(saved)
    return torch.as_tensor(base.set_state(state["base"]))


def _layers(env: EnvBase) -> tuple[list[Transform], EnvBase]:
    transforms: list[Transform] = []
    while isinstance(env, TransformedEnv):
        transforms += list(env.transform) if isinstance(env.transform, Compose) else [env.transform]
        env = env.base_env
    return transforms, env
