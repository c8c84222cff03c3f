"""Which dimension of an image is which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

MIN_SIDE = 32
"""Sides of what is taken for a picture; what is smaller is a grid or a vector."""


def is_picture(shape: Sequence[int]) -> bool:
    """Whether what has three dimensions is large enough to be taken for a picture."""
    return len(shape) == 3 and sorted(shape)[1] >= MIN_SIDE


class ImageLayout(NamedTuple):
    """How an image lies in a tensor."""

    num_dims: int
    """2 for [H, W]; 3 for [C, H, W] or [H, W, C]; 4 for a stack [K, C, H, W] or [K, H, W, C], K C channels."""
    is_channels_last: bool
    channels: int
    """All frames of a stack together."""
    height: int
    width: int

    def to_channels_first(self, images: Tensor) -> Tensor:
        """[*B, *shape] to [B, C, H, W], the batch flattened; no copy but for stacks with channels last."""
        images = images.reshape(-1, *images.shape[images.ndim - self.num_dims :])
        if self.num_dims == 2:
            return images.unsqueeze(1)
        images = images.movedim(-1, -3) if self.is_channels_last else images
        return images.flatten(1, -3) if self.num_dims == 4 else images


def image_layout(shape: Sequence[int]) -> ImageLayout:
    """Reads the layout off the shape of one image.

    Channels are the end, first or last, that leaves a square if the other does not; else the smaller one, and of two
    equal ones the last, as gymnasium has it. Only images that are not square and have more channels than a side has
    pixels are read wrongly.

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
    return ImageLayout(len(shape), is_last, channels * (shape[0] if len(shape) == 4 else 1), height, width)
