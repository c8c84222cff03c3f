"""Encoders: from observations to features."""

from cyborg_torchrl.modules.encoders.autocast import Autocast
from cyborg_torchrl.modules.encoders.build import ObservationEncoder, build_encoder
from cyborg_torchrl.modules.encoders.discrete import CategoryEmbedding, OneHotCategories
from cyborg_torchrl.modules.encoders.grid import GridEncoder
from cyborg_torchrl.modules.encoders.mixed import MixedEncoder
from cyborg_torchrl.modules.encoders.pixels import PixelEncoder
from cyborg_torchrl.modules.encoders.vector import ScaledVector, VectorEncoder

__all__ = [
    "Autocast",
    "CategoryEmbedding",
    "GridEncoder",
    "MixedEncoder",
    "ObservationEncoder",
    "OneHotCategories",
    "PixelEncoder",
    "ScaledVector",
    "VectorEncoder",
    "build_encoder",
]
