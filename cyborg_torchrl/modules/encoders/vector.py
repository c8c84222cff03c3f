"""Encoders of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cyborg_torchrl.cores.kernels.linear import linear


class VectorEncoder(nn.Module):
    """Encoder of vectors; by default one linear map.

    There is no bias: a blank observation embeds to zero and writes nothing into memory.

    Args:
        in_features: total width of all observations.
        features: F, width of the embedding.
        hidden_sizes: widths of SiLU layers before the last map.
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
        """The map to the features, which is the last layer."""
        return cast("nn.Linear", self.network[-1])

    def forward(self, *observations: Float[Tensor, "*B _"]) -> Float[Tensor, "*B F"]:
        """Concatenate the observations in the precision of the weights, and embed them."""
        last = self.last
        dtype = last.weight.dtype
        parts = [observation.to(dtype) for observation in observations]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        # With one layer, the call of nn.Sequential would cost more than the map itself while acting.
        return self.network(x) if len(self.network) > 1 else linear(x, last.weight)


class ScaledVector(nn.Module):
    """Numbers of any kind and shape as one float vector, [*B, *shape] to [*B, width].

    Integers are divided by the largest absolute value that their bounds allow. Nothing is subtracted, so zero stays
    zero.

    Args:
        shape: shape of one observation; [] for a single number.
        scale: divisor of each entry, [*shape], not zero; None: no scaling.
    """

    scale: Tensor | None

    def __init__(self, shape: Sequence[int], scale: Tensor | None = None) -> None:
        super().__init__()
        self.num_dims, self.width = len(shape), torch.Size(shape).numel()
        self.register_buffer("scale", None if scale is None else scale.flatten(), persistent=False)

    def forward(self, observation: Tensor) -> Float[Tensor, "*B W"]:
        """Flatten and scale."""
        flat = flatten_last(observation, self.num_dims)
        flat = flat if flat.is_floating_point() else flat.float()
        return flat if self.scale is None else flat / self.scale


def flatten_last(observation: Tensor, num_dims: int) -> Tensor:
    """Flatten the last `num_dims` dimensions, [*B, *shape] to [*B, width]; a scalar becomes a vector of width 1."""
    return observation.flatten(-num_dims) if num_dims else observation.unsqueeze(-1)
