"""Image encoders: a small network, the Nature and the Impala network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from cyborg_torchrl.modules.encoders.images import image_layout
from cyborg_torchrl.registry import check_known

SMALLEST = {"small": 8, "impala": 8, "nature": 36}
"""Least side of an image for each network."""
CHOICES = ("auto", *SMALLEST)
LARGEST_SMALL_SIDE = 48
"""Images with a shorter side up to this are read by the small network, if the choice is "auto"."""
BLOCK_NUMBERS = 2**21
"""Size of the first convolution's output that a CPU computes at once, so that it stays in the cache: 32 images of
64 x 64 for "impala"."""
KEPT_NUMBERS = 2**25
"""Above this size (512 such images, about 600 MB of activations) the backward pass recomputes the activations. Other
devices compute so many at once."""


def choose_convolutions(convolutions: str, height: int, width: int) -> str:
    """Return the name of the network for images of a size; "auto" is "small" up to 48 pixels, else "nature"."""
    if convolutions != "auto":
        return convolutions
    return "small" if min(height, width) <= LARGEST_SMALL_SIDE else "nature"


def build_small(channels: int, widths: Sequence[int] = (16, 32, 32)) -> nn.Sequential:
    """Build a network for small images: convolutions of 3 x 3 with stride 2, so that each halves the sides."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten())


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))), [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the output of two convolutions."""
        return x + self.second(torch.relu(self.first(torch.relu(x))))


def build_impala(channels: int, widths: Sequence[int] = (16, 32, 32)) -> nn.Sequential:
    """Build the residual network of Espeholt et al. (2018), figure 3 right: 15 convolutions in three stages.

    A stage is a convolution of 3 x 3, max-pooling of 3 x 3 with stride 2, and two residual blocks.
    """
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)]
        layers += [ResidualBlock(width), ResidualBlock(width)]
        channels = width
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten())


def build_nature(channels: int) -> nn.Sequential:
    """Build the network of Mnih et al. (2015): three convolutions."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 8, stride=4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Flatten(),
    )


BUILDERS = {"small": build_small, "impala": build_impala, "nature": build_nature}


class PixelEncoder(nn.Module):
    """Convolutional encoder of images, channels first or last. It scales bytes to [0, 1].

    Batches go through the convolutions block by block. For large batches the backward pass recomputes the activations
    of a block, so memory grows only by the images and their flat features.

    Args:
        shape: shape of one image, [C, H, W] or [H, W, C], [H, W] without channels, or a stack of frames [K, ...].
        features: F, width of the embedding.
        convolutions: "small", "nature", "impala", or "auto": by the size (see `choose_convolutions`).
        byte_bounds: integers that become 0 and 1.
        float_bounds: floats that become 0 and 1.

    Raises:
        ValueError: if the network's name is unknown, or the shape is not that of an image that is large enough for it.

    Source: Espeholt et al. (2018), figure 3 right; Mnih et al. (2015). Ours ends in one linear map without bias and
    without a nonlinearity, since the modules that read the features normalise them.
    """

    def __init__(
        self,
        shape: Sequence[int],
        features: int,
        convolutions: str = "auto",
        *,
        byte_bounds: tuple[float, float] = (0.0, 255.0),
        float_bounds: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        check_known("convolutions", convolutions, CHOICES)
        self.layout = image_layout(shape)
        self.byte_bounds, self.float_bounds = byte_bounds, float_bounds
        channels, height, width = self.layout[2:]
        self.name = choose_convolutions(convolutions, height, width)
        least = SMALLEST[self.name]
        if min(height, width) < least:
            raise ValueError(
                f"the pixel encoder '{self.name}' needs images of at least {least} x {least} pixels; got {height} x "
                f"{width}."
            )
        self.convolutions = BUILDERS[self.name](channels)
        with torch.no_grad():
            image = torch.zeros(1, channels, height, width)
            numbers = max(image.numel(), self.convolutions[0](image).numel())
            self.block, self.kept = max(1, BLOCK_NUMBERS // numbers), max(1, KEPT_NUMBERS // numbers)
            self.project = nn.Linear(self.convolutions(image).shape[-1], features, bias=False)

    def forward(self, pixels: Tensor) -> Float[Tensor, "*B F"]:
        """Encode images [*B, *shape]; [*B] may be empty."""
        batch = pixels.shape[: pixels.ndim - self.layout.num_dims]
        images = self.layout.to_channels_first(pixels)
        block = self.block if images.device.type == "cpu" else self.kept
        if torch.compiler.is_exporting() or images.shape[0] <= block:  # one block for any batch
            return self._embed(images).reshape(*batch, -1)
        embed = self._embed_again if torch.is_grad_enabled() and images.shape[0] > self.kept else self._embed
        return torch.cat([embed(part) for part in images.split(block)]).reshape(*batch, -1)

    def _embed(self, images: Tensor) -> Tensor:
        return self.project(self.convolutions(self._scaled(images)))

    def _embed_again(self, images: Tensor) -> Tensor:
        """Embed images; the backward pass recomputes the convolutions.

        The parameters are arguments because a functional loss has removed them from the module by then.
        """
        parameters = dict(self.convolutions.named_parameters())

        def convolve(images: Tensor, *values: Tensor) -> Tensor:
            return functional_call(self.convolutions, dict(zip(parameters, values, strict=True)), self._scaled(images))

        flat = checkpoint(convolve, images, *parameters.values(), use_reentrant=False, preserve_rng_state=False)
        return self.project(flat)

    def _scaled(self, images: Tensor) -> Tensor:
        low, high = self.float_bounds if images.is_floating_point() else self.byte_bounds
        images = images.to(self.project.weight.dtype)
        images = images if (low, high) == (0.0, 1.0) else (images - low) / (high - low)
        # A CPU convolves and pools channels last faster: Impala trains in 0.5 to 0.7 of the time.
        return images.contiguous(memory_format=torch.channels_last) if images.device.type == "cpu" else images
