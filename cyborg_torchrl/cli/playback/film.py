"""Episodes as moving pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cyborg_torchrl.cli.playback.episodes import Frame
from cyborg_torchrl.registry import UnavailableError

FILMS = (".gif", ".mp4")
EXTRA = "pip install 'cyborg-torchrl[play]'"
CAPTION = 40
"""Height of the caption, in pixels; even, as MP4 has it."""
FONT = 13


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
        try:
            from PIL import Image, ImageDraw, ImageFont
        except ImportError:
            raise UnavailableError(f"films need Pillow: {EXTRA}") from None
        self._image, self._draw = Image, ImageDraw
        self._font = ImageFont.load_default(FONT)
        self.path, self.size, self.fps = path, size, fps
        self._pictures: list[Any] = []  # of a GIF, which Pillow writes in one go
        self._writer = _mp4_writer(path, fps) if path.suffix == ".mp4" else None

    def add(self, frame: Frame) -> None:
        """Add a frame's picture, if it has one."""
        if frame.picture is None:
            return
        image = self._captioned(frame)
        if self._writer is not None:
            self._writer.append_data(np.asarray(image))
        else:
            self._pictures.append(image.quantize(128))

    def close(self) -> None:
        """Write the rest of the film."""
        if self._writer is not None:
            self._writer.close()
        elif self._pictures:
            first, *others = self._pictures
            first.save(self.path, save_all=True, append_images=others, duration=round(1000 / self.fps), loop=0)

    def _captioned(self, frame: Frame) -> Any:
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
        return image


def _mp4_writer(path: Path, fps: int) -> Any:
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg  # noqa: F401
    except ImportError as error:
        raise UnavailableError(f"MP4 films need {error.name}: {EXTRA}") from None
    return imageio.get_writer(path, format="FFMPEG", mode="I", fps=fps, macro_block_size=2)
