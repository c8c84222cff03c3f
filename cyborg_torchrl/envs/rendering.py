"""Pictures of an environment, and the names of its actions."""

from __future__ import annotations

from enum import EnumMeta
from typing import Any

import numpy as np
import numpy.typing as npt
from tensordict import TensorDictBase
from torchrl.envs import EnvBase, TransformedEnv

from cyborg_torchrl import keys
from cyborg_torchrl.envs.gym.batch import GymnasiumEnv
from cyborg_torchrl.modules.encoders.images import image_layout

Picture = npt.NDArray[np.uint8]
"""[H, W, 3] bytes."""


def first_game(env: EnvBase) -> Any:
    """Return the first gymnasium environment of a batch; None for other kinds, and for those in other processes."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    games = env.games.envs if isinstance(env, GymnasiumEnv) else None
    return games[0] if games else None


def action_names(env: EnvBase) -> list[str] | None:
    """Return the names of discrete actions, from the attribute `action_names` or the enumeration `actions`."""
    game = first_game(env)
    if game is None:
        return None
    names = getattr(game.unwrapped, "action_names", None) or getattr(game.unwrapped, "actions", None)
    if isinstance(names, EnumMeta):
        names = [str(action.name) for action in names]
    number = getattr(game.action_space, "n", None)
    if not isinstance(names, (list, tuple)) or len(names) != number:
        return None
    return [str(name) for name in names]


def picture(env: EnvBase, tensordict: TensorDictBase) -> Picture | None:
    """Return a picture of the first environment: its pixels or its rendering; None without either.

    Args:
        env: the environment.
        tensordict: the present tensordict of the environment.
    """
    pixels = tensordict.get(keys.PIXELS, None)
    if pixels is not None:
        return _bytes(pixels[0].cpu().numpy())
    game = first_game(env)
    if game is None or game.render_mode != "rgb_array":
        return None
    drawn = game.render()
    return np.ascontiguousarray(drawn[..., :3], np.uint8)


def _bytes(image: np.ndarray) -> Picture:
    """Return the newest frame of an image of any layout as bytes."""
    layout = image_layout(image.shape)
    if layout.num_dims == 4:  # a stack
        image, layout = image[-1], image_layout(image.shape[1:])
    if layout.num_dims == 2:
        image = image[..., None]
    elif not layout.is_channels_last:
        image = np.moveaxis(image, 0, -1)
    if image.dtype != np.uint8:
        image = (image.astype(np.float64) * 255.0).round().clip(0, 255).astype(np.uint8)
    channels = image.shape[-1]
    newest = image[..., -3:] if channels % 3 == 0 else image[..., -1:].repeat(3, -1)
    return np.ascontiguousarray(newest)
