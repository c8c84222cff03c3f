"""Episodes of a trained agent, one step at a time, as a film or as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl import keys
from cyborg_torchrl.envs.rendering import Picture, action_names, picture
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.registry import UnavailableError

FILMS = (".gif", ".mp4")
CAPTION = 40
"""Height of the caption, in pixels; even, as MP4 has it."""
FONT = 13
MAX_NUMBERS = 16
"""Larger observations are described by shape, range and mean."""


class Frame(NamedTuple):
    """A step: the observation, the action and its result."""

    episode: int
    step: int
    observation: dict[str, Tensor]
    """The agent's input, without a batch dimension."""
    action: str
    """Its name, or its value if it has no name; "" after the end of the episode."""
    reward: float
    """Raw."""
    total: float
    """Sum of rewards up to this step."""
    end: str
    """"", "terminated", "truncated", or "cut" by the limit of steps."""
    success: float | None
    """Reported by the environment after the step."""
    picture: Picture | None


@torch.no_grad()
def play(
    agent: PPOAgent, env: EnvBase, episodes: int, *, is_deterministic: bool = True, max_steps: int | None = None
) -> Iterator[Frame]:
    """Play episodes. The last frame of each shows the result of its last action.

    Args:
        agent: the agent.
        env: its environment (`build_acting_env`), of one row.
        episodes: how many.
        is_deterministic: take the likeliest action, not a sample.
        max_steps: steps after which an episode is cut; None: never.
    """
    names = action_names(env)
    mode = ExplorationType.DETERMINISTIC if is_deterministic else ExplorationType.RANDOM
    for episode in range(1, episodes + 1):
        tensordict, total, end, step, success = env.reset(), 0.0, "", 0, None
        while not end:
            shown, observation = picture(env, tensordict), _read(agent, tensordict)
            with set_exploration_type(mode), set_recurrent_mode(False):
                tensordict = env.step(agent(tensordict))
            after = tensordict[keys.NEXT]
            before, total = total, _total(after, total)
            step += 1
            end = _end(after) or ("cut" if step == max_steps else "")
            reported = after.get(keys.SUCCESS, None)
            success = None if reported is None or bool(reported.isnan()) else float(reported)
            action = _written(tensordict[keys.ACTION][0], names)
            yield Frame(episode, step, observation, action, total - before, total, end, success, shown)
            tensordict = env.step_mdp(tensordict)
        shown = picture(env, tensordict)
        yield Frame(episode, step, _read(agent, tensordict), "", 0.0, total, end, success, shown)


def _read(agent: PPOAgent, tensordict: TensorDictBase) -> dict[str, Tensor]:
    return {key if isinstance(key, str) else ".".join(key): tensordict[key][0] for key in agent.encoder.in_keys}


def _total(after: TensorDictBase, before: float) -> float:
    """Return the sum of raw rewards so far, from the environment if it reports one."""
    raw = after.get(keys.EPISODE_REWARD, None)
    return before + float(after[keys.REWARD]) if raw is None else float(raw)


def _end(after: TensorDictBase) -> str:
    if not bool(after[keys.DONE]):
        return ""
    return "truncated" if bool(after.get(keys.TRUNCATED, torch.tensor(False))) else "terminated"


def _written(action: Tensor, names: list[str] | None) -> str:
    if names is not None and action.numel() == 1:
        return names[int(action)]
    numbers = action.flatten().tolist()
    text = " ".join(f"{number:.3g}" if isinstance(number, float) else str(number) for number in numbers)
    return text if action.ndim == 0 else f"[{text}]"


class Film:
    """A film, with the step, the action and the rewards below each picture.

    Args:
        path: ends in .gif or .mp4.
        size: pixels of the longer side, at most; pictures are enlarged by whole numbers.
        fps: pictures a second.

    Raises:
        UnavailableError: if a package is missing.
    """

    def __init__(self, path: Path, *, size: int = 320, fps: int = 10) -> None:
        options: dict[str, Any] = {"duration": round(1000 / fps), "loop": 0, "bits": 7}  # of GIF: 128 colours
        if path.suffix == ".mp4":
            options = {"format": "FFMPEG", "fps": fps, "macro_block_size": 2}
        try:
            import imageio.v2 as imageio
            import imageio_ffmpeg  # noqa: F401
            from PIL import Image, ImageDraw, ImageFont
        except ImportError as error:
            raise UnavailableError(f"films need {error.name}: pip install 'cyborg-torchrl[play]'") from None
        self._image, self._draw = Image, ImageDraw
        self._font = ImageFont.load_default(FONT)
        self.size = size
        self._writer: Any = imageio.get_writer(path, mode="I", **options)

    def add(self, frame: Frame) -> None:
        """Add a frame with a picture."""
        assert frame.picture is not None
        height, width = frame.picture.shape[:2]
        scale = max(1, self.size // max(height, width))
        picture = self._image.fromarray(frame.picture).resize((width * scale, height * scale), resample=0)
        even = (picture.width + picture.width % 2, picture.height + picture.height % 2 + CAPTION)
        image = self._image.new("RGB", even)
        image.paste(picture, (0, 0))
        what = frame.action or frame.end
        text = f"episode {frame.episode}   step {frame.step}\n{what}   reward {frame.reward:g}   sum {frame.total:g}"
        self._draw.Draw(image).text((4, even[1] - CAPTION + 3), text, font=self._font, fill=(230, 230, 230))
        self._writer.append_data(np.asarray(image))

    def close(self) -> None:
        """Write the rest of the film."""
        self._writer.close()


def trace(frames: Iterable[Frame], *, is_full: bool = False) -> Iterator[str]:
    """Yield episodes as lines of text: one for each step.

    Args:
        frames: from `play`.
        is_full: a line for every step. False: only count steps with the same observation and no reward.
    """
    episode, last, skipped = 0, "", 0
    for frame in frames:
        if frame.episode != episode:
            episode, last = frame.episode, ""
            yield f"episode {episode}"
            yield "  step  observation -> action, reward"
        seen = ", ".join(_described(name, value) for name, value in frame.observation.items())
        has_result = frame.reward != 0.0 or frame.end
        if seen == last and not has_result and not is_full:
            skipped += 1
            continue
        last = seen
        if skipped:
            yield f"        ... {skipped} more with the same observation and no reward"
            skipped = 0
        if frame.action:
            yield f"{frame.step:>6}  {seen} -> {frame.action}, {frame.reward:g}"
        else:
            success = "" if frame.success is None else f", success {frame.success:g}"
            yield f"  {frame.end} after {frame.step} steps: return {frame.total:g}{success}"


def _described(name: str, value: Tensor) -> str:
    numbers = value.flatten()
    if numbers.numel() <= MAX_NUMBERS:
        text = " ".join(f"{number:.3g}" for number in numbers.tolist())
        return f"{name} [{text}]" if value.ndim else f"{name} {text}"
    numbers = numbers.to(torch.float64)
    low, high, mean = float(numbers.min()), float(numbers.max()), float(numbers.mean())
    return f"{name} {list(value.shape)} from {low:.3g} to {high:.3g}, mean {mean:.4g}"
