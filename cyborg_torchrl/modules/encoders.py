# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (tensordict's and torchrl's annotations are narrower than what they take)
"""Encoders: from what the environment shows to features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Composite

from cyborg_torchrl import keys


class VectorEncoder(nn.Module):
    """Embeds vectors: one linear map without bias by default.

    Without a bias a blank observation embeds to zero and writes nothing into memory.

    Args:
        in_features: width of the observations, all inputs together.
        features: F, width of the embedding.
        hidden_sizes: widths of SiLU layers before the last map, if any.
    """

    def __init__(self, in_features: int, features: int, hidden_sizes: Sequence[int] = ()) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden_sizes:
            layers += [nn.Linear(in_features, width, bias=False), nn.SiLU()]
            in_features = width
        self.network = nn.Sequential(*layers, nn.Linear(in_features, features, bias=False))

    def forward(self, *observations: Float[Tensor, "*B _"]) -> Float[Tensor, "*B F"]:
        """Concatenates the observations and embeds them."""
        return self.network(torch.cat(observations, -1))


class PixelEncoder(nn.Module):
    """Convolutional encoder of images, channels first or last; uint8 becomes [0, 1] here and not before.

    Args:
        shape: shape of one image, [C, H, W] or [H, W, C]; the smaller end is taken as channels.
        features: F, width of the embedding.

    Raises:
        ValueError: if the shape is not that of an image of at least 36 x 36 pixels.

    Source: Mnih et al. (2015), the "Nature" network.
    """

    def __init__(self, shape: Sequence[int], features: int) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"an image has three dimensions, [C, H, W] or [H, W, C]; got shape {tuple(shape)}.")
        self.is_channels_last = shape[-1] < shape[0]
        channels, height, width = (shape[2], shape[0], shape[1]) if self.is_channels_last else shape
        if min(height, width) < 36:
            raise ValueError(f"the pixel encoder needs images of at least 36 x 36 pixels; got {height} x {width}.")
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),
            nn.Flatten(),
        )
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, channels, height, width)).shape[-1]
        self.project = nn.Linear(flat, features, bias=False)

    def forward(self, pixels: Tensor) -> Float[Tensor, "*B F"]:
        """Encodes images [*B, C, H, W] or [*B, H, W, C]."""
        images = pixels.flatten(0, -4) if pixels.ndim > 3 else pixels.unsqueeze(0)
        images = images.movedim(-1, 1) if self.is_channels_last else images
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        embedding = self.project(self.convolutions(images.to(self.project.weight.dtype) / scale))
        return embedding.reshape(*pixels.shape[:-3], -1)


def build_encoder(
    observation_spec: Composite,
    *,
    batch_dims: int,
    features: int = 64,
    hidden_sizes: Sequence[int] = (),
    observation_keys: Sequence[NestedKey] | None = None,
) -> TensorDictModule:
    """Builds the encoder that fits an environment's observations.

    Args:
        observation_spec: the environment's.
        batch_dims: number of batch dimensions of the environment, which the spec's shapes begin with.
        features: F, width of the embedding.
        hidden_sizes: layers of a vector encoder before its last map.
        observation_keys: what to read, nested keys as tuples; None: "pixels" if there are any, else "observation".

    Raises:
        ValueError: if a key is missing, or observations are of a kind that no encoder reads.
    """
    known = set(observation_spec.keys(True, True))
    if observation_keys is None:
        observation_keys = [key for key in (keys.PIXELS, keys.OBSERVATION) if key in known][:1]
    missing = [key for key in observation_keys if key not in known]
    if missing or not observation_keys:
        names = ", ".join(sorted(map(str, known)))
        raise ValueError(f"no observation {missing or 'to read'} in the environment; it has: {names}.")
    specs = [observation_spec[key] for key in observation_keys]
    shapes = [spec.shape[batch_dims:] for spec in specs]
    if all(len(shape) == 1 and spec.dtype.is_floating_point for shape, spec in zip(shapes, specs, strict=True)):
        network: nn.Module = VectorEncoder(sum(shape[0] for shape in shapes), features, hidden_sizes)
    elif len(shapes) == 1 and len(shapes[0]) == 3:
        network = PixelEncoder(shapes[0], features)
    else:
        kinds = ", ".join(f"{k}: {s.dtype} {list(h)}" for k, s, h in zip(observation_keys, specs, shapes, strict=True))
        raise ValueError(f"encoders read float vectors, or one image; got {kinds}.")
    return TensorDictModule(network, in_keys=list(observation_keys), out_keys=[keys.FEATURES])
