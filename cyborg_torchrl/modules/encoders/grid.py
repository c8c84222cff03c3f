"""Grids of integers that are names of objects, as in MiniGrid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cyborg_torchrl.modules.encoders.images import image_layout


class GridEncoder(nn.Module):
    """Encoder of small images whose numbers are names: integers [*B, H, W, C] or [*B, C, H, W].

    Each channel has a table of embeddings. The embeddings of a cell's channels are added, and two convolutions of 3 x 3
    read neighbouring cells. There is no bias and 0 embeds to zero, so a grid of zeros embeds to exactly zero.

    Args:
        shape: shape of one grid; which end is channels is decided as for images.
        features: F, width of the embedding.
        num_values: numbers run from 0 to num_values - 1.
        embedding_size: width of the embedding of a number.

    Source: the "bag of words" encoder of Hui et al. (2020), BabyAI 1.1; narrower here, without batch norm and pooling.
    """

    first_row: Tensor

    def __init__(self, shape: Sequence[int], features: int, num_values: int = 256, embedding_size: int = 16) -> None:
        super().__init__()
        self.layout = image_layout(shape)
        first_row = num_values * torch.arange(self.layout.channels).view(-1, 1, 1)
        self.register_buffer("first_row", first_row, persistent=False)
        self.table = nn.Embedding(num_values * self.layout.channels, embedding_size)
        self.convolutions = nn.Sequential(
            nn.Conv2d(embedding_size, 32, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.project = nn.Linear(32 * self.layout.height * self.layout.width, features, bias=False)

    def forward(self, grid: Tensor) -> Float[Tensor, "*B F"]:
        """Encode grids; [*B] may be empty."""
        batch = grid.shape[: grid.ndim - self.layout.num_dims]
        numbers = self.layout.to_channels_first(grid).long()
        cells = self.table(numbers + self.first_row) * (numbers != 0).unsqueeze(-1)
        embedding = self.project(self.convolutions(cells.sum(1).movedim(-1, 1)))
        return embedding.reshape(*batch, -1)
