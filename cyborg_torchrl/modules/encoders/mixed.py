"""Encoder of several observations together."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from cyborg_torchrl.modules.encoders.discrete import CategoryEmbedding, OneHotCategories
from cyborg_torchrl.modules.encoders.grid import GridEncoder
from cyborg_torchrl.modules.encoders.pixels import PixelEncoder
from cyborg_torchrl.modules.encoders.vector import ScaledVector, VectorEncoder

VectorReader = ScaledVector | OneHotCategories | CategoryEmbedding
ImageReader = PixelEncoder | GridEncoder


class MixedEncoder(nn.Module):
    """Sum of one embedding of all vectors and one embedding of each image, [*B, F].

    Args:
        readers: one for each observation, in order: a module that returns a vector, or the encoder of an image.
        features: F, width of the embedding.
        hidden_sizes: widths of hidden layers for the vectors.
    """

    def __init__(
        self, readers: Sequence[VectorReader | ImageReader], features: int, hidden_sizes: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.readers = nn.ModuleList(readers)
        width = sum(reader.width for reader in readers if isinstance(reader, VectorReader))
        self.vector = VectorEncoder(width, features, hidden_sizes) if width else None

    def forward(self, *observations: Tensor) -> Float[Tensor, "*B F"]:
        """Encode observations [*B, *shape], one for each reader."""
        vectors: list[Tensor] = []
        parts: list[Tensor] = []
        for reader, observation in zip(self.readers, observations, strict=True):
            group = vectors if isinstance(reader, VectorReader) else parts
            group.append(reader(observation))
        if self.vector is not None:
            parts.append(self.vector(*vectors))
        return sum(parts[1:], start=parts[0])
