"""Categories: as one-hot vectors, or as learned embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cyborg_torchrl.modules.encoders.vector import flatten_last


class OneHotCategories(nn.Module):
    """Integers as one-hot vectors side by side, [*B, *shape] to [*B, sum of the numbers of categories].

    An integer that is none of the categories, such as -1 for "nothing yet", is blank: its part is all zero.

    Args:
        shape: shape of one observation; [] for a single category.
        num_categories: of each entry, in the order of the flattened shape.
    """

    entry: Tensor
    category: Tensor

    def __init__(self, shape: Sequence[int], num_categories: Sequence[int]) -> None:
        super().__init__()
        self.num_dims, self.width = len(shape), sum(num_categories)
        sizes = torch.tensor(num_categories)
        entry = torch.arange(len(num_categories)).repeat_interleave(sizes)
        category = torch.cat([torch.arange(size) for size in num_categories])
        self.register_buffer("entry", entry, persistent=False)
        self.register_buffer("category", category, persistent=False)

    def forward(self, observation: Tensor) -> Float[Tensor, "*B W"]:
        """Compare each entry with each of its categories, without control flow, so that vmap and compile work."""
        return (flatten_last(observation, self.num_dims)[..., self.entry] == self.category).float()


class CategoryEmbedding(nn.Module):
    """Integers as learned vectors side by side, [*B, *shape] to [*B, entries x size]; each entry has its own table.

    Args:
        shape: shape of one observation; [] for a single category.
        num_categories: of each entry, in the order of the flattened shape.
        size: width of the vector of one category.
    """

    first_row: Tensor

    def __init__(self, shape: Sequence[int], num_categories: Sequence[int], size: int) -> None:
        super().__init__()
        self.num_dims, self.width = len(shape), len(num_categories) * size
        sizes = torch.tensor(num_categories)
        self.register_buffer("first_row", sizes.cumsum(0) - sizes, persistent=False)
        self.table = nn.Embedding(int(sizes.sum()), size)

    def forward(self, observation: Tensor) -> Float[Tensor, "*B W"]:
        """Look each entry up in its part of the table."""
        return self.table(flatten_last(observation, self.num_dims).long() + self.first_row).flatten(-2)
