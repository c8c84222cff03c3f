"""Vectors: flattened, scaled and embedded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


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

    @property
    def last(self) -> nn.Linear:
        """The map to the features."""
        return cast("nn.Linear", self.network[-1])

    def forward(self, *observations: Float[Tensor, "*B _"]) -> Float[Tensor, "*B F"]:
        """Concatenates the observations, in the precision of the weights, and embeds them."""
        last = self.last
        dtype = last.weight.dtype
        parts = [observation.to(dtype) for observation in observations]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        # one map alone, without the sequence around it: its time counts while acting
        return self.network(x) if len(self.network) > 1 else F.linear(x, last.weight)


class ScaledVector(nn.Module):
    """Numbers of any kind and shape as one float vector, [*B, *shape] to [*B, width].

    What is zero stays zero: integers are divided by the greatest size that their bounds allow, and nothing is
    subtracted.

    Args:
        shape: shape of one observation; [] for a single number.
        scale: what each entry is divided by, [*shape] and not zero; None: nothing.
    """

    scale: Tensor | None

    def __init__(self, shape: Sequence[int], scale: Tensor | None = None) -> None:
        super().__init__()
        self.num_dims, self.width = len(shape), torch.Size(shape).numel()
        self.register_buffer("scale", None if scale is None else scale.flatten(), persistent=False)

    def forward(self, observation: Tensor) -> Float[Tensor, "*B W"]:
        """Flattens, and scales."""
        flat = flatten_last(observation, self.num_dims)
        flat = flat if flat.is_floating_point() else flat.float()
        return flat if self.scale is None else flat / self.scale


def flatten_last(observation: Tensor, num_dims: int) -> Tensor:
    """The last `num_dims` dimensions as one, [*B, *shape] to [*B, width]; a number gets a dimension of its own."""
    return observation.flatten(-num_dims) if num_dims else observation.unsqueeze(-1)
