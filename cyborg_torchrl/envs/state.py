"""Save and restore the state of environments between two steps, also in another process.

An environment that supports this has two methods:

- `get_state() -> dict`: tensors, numbers, texts, lists and dicts.
- `set_state(state) -> Tensor`: [N] bool, true for environments that could not be restored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchrl.envs import EnvBase, Transform, TransformedEnv

from cyborg_torchrl.envs.transforms.normalization import transforms_of


def environment_state(env: EnvBase) -> dict[str, Any] | None:
    """Return the state of an environment and its transforms; None without `get_state` and `set_state`."""
    transforms, base = _layers(env)
    if not _has_state(base):
        return None
    return {"base": base.get_state(), "transforms": [transform.state_dict() for transform in transforms]}


def set_environment_state(env: EnvBase, state: Mapping[str, Any]) -> Tensor:
    """Restore a state of `environment_state`.

    Returns:
        [N] bool, true for environments that could not be restored and must be reset.

    Raises:
        ValueError: if the state belongs to another environment.
    """
    transforms, base = _layers(env)
    if len(state["transforms"]) != len(transforms) or not _has_state(base):
        raise ValueError("the state belongs to another environment.")
    for transform, saved in zip(transforms, state["transforms"], strict=True):
        transform.load_state_dict(saved)
    lost = base.set_state(state["base"])
    return torch.zeros(env.batch_size, dtype=torch.bool) if lost is None else torch.as_tensor(lost)


def _has_state(base: EnvBase) -> bool:
    """Return whether an environment has both methods; TorchRL's base class has a `set_state` that does nothing."""
    kind = type(base)
    has_set = getattr(kind, "set_state", None) is not getattr(EnvBase, "set_state", None)
    return hasattr(kind, "get_state") and has_set


def _layers(env: EnvBase) -> tuple[list[Transform], EnvBase]:
    transforms = list(transforms_of(env))
    while isinstance(env, TransformedEnv):
        env = env.base_env
    return transforms, env
