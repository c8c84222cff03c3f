"""The layout of images: which dimension holds channels, height and width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

MIN_SIDE = 28
"""Least side of an array that is read as a picture by default. The grids of MiniGrid have at most 25 cells a side."""


def is_picture(shape: Sequence[int]) -> bool:
    """Return whether an array has three dimensions and is large enough for a picture."""
    return len(shape) == 3 and sorted(shape)[1] >= MIN_SIDE


class ImageLayout(NamedTuple):
    """Layout of an image in a tensor."""

    num_dims: int
    """2 for [H, W]; 3 for [C, H, W] or [H, W, C]; 4 for a stack [K, C, H, W] or [K, H, W, C], K C channels."""
    is_channels_last: bool
    channels: int
    """All frames of a stack together."""
    height: int
    width: int

    def to_channels_first(self, images: Tensor) -> Tensor:
        """Return images [*B, *shape] as [B, C, H, W]. Only stacks with channels last are copied."""
        images = images.reshape(-1, *images.shape[images.ndim - self.num_dims :])
        if self.num_dims == 2:
            return images.unsqueeze(1)
        images = images.movedim(-1, -3) if self.is_channels_last else images
        return images.flatten(1, -3) if self.num_dims == 4 else images


def image_layout(shape: Sequence[int]) -> ImageLayout:
    """Derive the layout from the shape of one image.

    Channels are the first or the last dimension. If only one choice leaves a square, that choice is right. Otherwise
    the smaller dimension holds the channels. If both are equal, it is the last one, as in gymnasium. Images that are
    not square and have more channels than a side has pixels are read wrongly.

    Raises:
        ValueError: if the shape has not two to four dimensions.
    """
    shape = tuple(shape)
    if len(shape) == 2:
        return ImageLayout(2, False, 1, *shape)
    if len(shape) not in (3, 4):
        raise ValueError(
            f"an image has three dimensions, [C, H, W] or [H, W, C], two without channels, or four as a stack of "
            f"frames; got shape {shape}."
        )
    first, middle, last = shape[-3:]
    has_square_behind, has_square_before = middle == last, first == middle
    is_last = has_square_before if has_square_before != has_square_behind else last <= first
    channels, height, width = (last, first, middle) if is_last else (first, middle, last)
    frames = shape[0] if len(shape) == 4 else 1
    return ImageLayout(len(shape), is_last, frames * channels, height, width)
