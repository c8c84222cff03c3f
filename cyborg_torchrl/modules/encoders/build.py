"""From an environment's specs to the encoder that reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torchrl.data import Binary, Categorical, Composite, MultiCategorical, NonTensor, OneHot, TensorSpec

from cyborg_torchrl import keys
from cyborg_torchrl.modules.encoders.autocast import Autocast
from cyborg_torchrl.modules.encoders.discrete import CategoryEmbedding, OneHotCategories
from cyborg_torchrl.modules.encoders.grid import GridEncoder
from cyborg_torchrl.modules.encoders.images import MIN_SIDE, image_layout
from cyborg_torchrl.modules.encoders.mixed import ImageReader, MixedEncoder, VectorReader
from cyborg_torchrl.modules.encoders.pixels import SMALLEST, PixelEncoder
from cyborg_torchrl.modules.encoders.vector import ScaledVector, VectorEncoder
from cyborg_torchrl.registry import did_you_mean

DISCRETE = ("one_hot", "embedding")
MAIN = (keys.PIXELS, keys.OBSERVATION)
"""Read alone where they are there, the first before the second."""
PREVIOUS = (keys.PREVIOUS_ACTION, keys.PREVIOUS_REWARD)
"""Read wherever they are there."""
BOOKKEEPING = frozenset(
    {
        keys.SUCCESS,
        keys.IS_INIT,
        keys.EPISODE_REWARD,
        keys.REWARD,
        keys.DONE,
        keys.TERMINATED,
        keys.TRUNCATED,
        keys.MEMORY_STATE,
        keys.MEMORY_METRICS,
        "recurrent_state",
        "step_count",
    }
)
"""Entries that are no observations; those of the last part of a nested key too."""


def build_encoder(
    observation_spec: Composite,
    *,
    batch_dims: int,
    features: int = 64,
    hidden_sizes: Sequence[int] = (),
    observation_keys: Sequence[NestedKey] | None = None,
    convolutions: str = "impala",
    discrete: str = "one_hot",
    embedding_size: int = 16,
    autocast: str | None = None,
) -> TensorDictModule:
    """Builds the encoder that fits an environment's observations.

    | observation | how it is read |
    |---|---|
    | floats of any shape | flattened; embedded together with all other vectors by one map without bias |
    | integers of any shape | the same, divided by their greatest size where they are bounded |
    | categories, several categories | as one-hot vectors, or embeddings |
    | binary, one-hot | as floats |
    | bytes or floats [C, H, W], [H, W, C], stacks [K, ...] of them, with sides of 32 or more | as pictures, by \
a convolutional network; bytes become [0, 1], and floats too where all are bounded alike |
    | bytes [H, W] with sides of 32 or more | as a picture of one channel |
    | smaller integers from 0 to 255 at most with three dimensions | as a grid of names (MiniGrid): `GridEncoder` |

    The parts are added. Float vectors alone are read by a `VectorEncoder`, one image alone by its encoder.

    Args:
        observation_spec: the environment's.
        batch_dims: number of batch dimensions of the environment, which the spec's shapes begin with.
        features: F, width of the embedding.
        hidden_sizes: layers of the vectors' encoder before its last map.
        observation_keys: what to read: names, nested keys as tuples or with dots ("camera.left"); a name that holds
            others stands for all of them. None: "pixels" if there are any, else "observation", else all entries that
            are no bookkeeping. "previous_action" and "previous_reward" are read in any case where they are there.
        convolutions: network of pictures, "impala" or "nature".
        discrete: how categories are read, "one_hot" or "embedding".
        embedding_size: width of the embedding of a category, or of a number in a grid.
        autocast: "bfloat16" or "float16": computes in it (see `Autocast`); None: float32.

    Raises:
        ValueError: if a key is missing, a choice unknown, or an observation is of a kind that no encoder reads.
    """
    for name, value, choices in (("discrete", discrete, DISCRETE), ("convolutions", convolutions, SMALLEST)):
        if value not in choices:
            raise ValueError(f"unknown {name} '{value}': {did_you_mean(value, choices)}")
    chosen = _chosen_keys(observation_spec, observation_keys)
    specs = {key: observation_spec[key] for key in chosen}
    if all(_is_float(spec) and len(spec.shape) == batch_dims + 1 for spec in specs.values()):
        width = sum(spec.shape[-1] for spec in specs.values())
        return _module(VectorEncoder(width, features, hidden_sizes), chosen, autocast)
    readers = []
    for key, spec in specs.items():
        reader = None
        if not isinstance(spec, (NonTensor, Composite)) and len(spec.shape) >= batch_dims:
            reader = _build_image(spec, spec.shape[batch_dims:], features, convolutions, embedding_size)
            reader = reader or _build_vector(spec, batch_dims, discrete, embedding_size)
        if reader is None:
            raise ValueError(_unreadable(key, spec, observation_spec))
        readers.append(reader)
    is_one_image = len(readers) == 1 and not isinstance(readers[0], VectorReader)
    network: nn.Module = readers[0] if is_one_image else MixedEncoder(readers, features, hidden_sizes)
    return _module(network, chosen, autocast)


def _module(network: nn.Module, read: Sequence[NestedKey], autocast: str | None) -> TensorDictModule:
    network = network if autocast is None else Autocast(network, autocast)
    return TensorDictModule(network, in_keys=read, out_keys=[keys.FEATURES])


def default_observations(spec: Composite) -> list[NestedKey]:
    """The leaves that are read where nothing is said: "pixels", else all below "observation", else all observations."""
    known = _observations(spec)
    return next((found for key in MAIN if (found := _below(known, key))), known)


def _observations(spec: Composite) -> list[NestedKey]:
    """The leaves that are no bookkeeping."""
    known: list[NestedKey] = [unravel_key(key) for key in spec.keys(True, True)]
    return [key for key in known if not BOOKKEEPING.intersection((_path(key)[0], _path(key)[-1]))]


def _below(leaves: Sequence[NestedKey], key: NestedKey) -> list[NestedKey]:
    path = _path(key)
    return [leaf for leaf in leaves if _path(leaf)[: len(path)] == path]


def _chosen_keys(spec: Composite, wanted: Sequence[NestedKey] | None) -> list[NestedKey]:
    """The leaves to read, in the order asked for or that of the spec."""
    known: list[NestedKey] = [unravel_key(key) for key in spec.keys(True, True)]

    names = ", ".join(sorted(map(_dotted, _observations(spec))))
    if wanted is None:
        chosen = default_observations(spec)
    else:
        dotted = {key: tuple(key.split(".")) if isinstance(key, str) else key for key in wanted}
        found = {key: _below(known, key) or _below(known, path) for key, path in dotted.items()}
        missing = [key for key, leaves in found.items() if not leaves]
        if missing:
            raise ValueError(f"no observation {missing} in the environment; it has: {names}.")
        chosen = [leaf for leaves in found.values() for leaf in leaves]
    chosen: list[NestedKey] = list(dict.fromkeys([*chosen, *(key for key in PREVIOUS if key in known)]))
    if not chosen:
        raise ValueError(f"no observation to read in the environment; it has: {names or '(none)'}.")
    return chosen


def _build_image(
    spec: TensorSpec, shape: torch.Size, features: int, convolutions: str, embedding_size: int
) -> ImageReader | None:
    """The encoder of a picture or a grid; None for whatever is neither."""
    if isinstance(spec, (Categorical, OneHot)) or len(shape) not in (2, 3, 4):
        return None
    layout, bounds = image_layout(shape), _common_bounds(spec)
    is_large = min(layout.height, layout.width) >= MIN_SIDE
    if spec.dtype == torch.uint8 and is_large:
        return PixelEncoder(shape, features, convolutions, byte_bounds=bounds or (0.0, 255.0))
    if _is_float(spec) and is_large and len(shape) > 2:
        return PixelEncoder(shape, features, convolutions, float_bounds=bounds or (0.0, 1.0))
    if _is_float(spec) or len(shape) != 3 or bounds is None or bounds[0] < 0 or bounds[1] > 255:
        return None
    return GridEncoder(shape, features, int(bounds[1]) + 1, embedding_size)


def _build_vector(spec: TensorSpec, batch_dims: int, discrete: str, embedding_size: int) -> VectorReader | None:
    """What makes a vector of an observation; None if nothing does."""
    shape = spec.shape[batch_dims:]
    if isinstance(spec, (Binary, OneHot)) or _is_float(spec) or spec.dtype == torch.bool:
        return ScaledVector(shape)
    if not isinstance(spec, Categorical):
        return ScaledVector(shape, _scale(spec, batch_dims)) if _is_integer(spec) else None
    if isinstance(spec, MultiCategorical):
        sizes = [int(n) for n in spec.nvec.reshape(-1, shape[-1])[0]] * shape[:-1].numel()
    else:
        sizes = [int(spec.space.n)] * shape.numel()
    if min(sizes, default=0) < 1:
        return None
    return OneHotCategories(shape, sizes) if discrete == "one_hot" else CategoryEmbedding(shape, sizes, embedding_size)


def _bounds(spec: TensorSpec) -> tuple[Tensor, Tensor] | None:
    """The bounds of all entries as floats; None where some are none, or no more than what the dtype can hold."""
    low, high = getattr(spec.space, "low", None), getattr(spec.space, "high", None)
    if low is None or high is None:
        return None
    limits = torch.finfo(spec.dtype) if _is_float(spec) else torch.iinfo(spec.dtype)
    is_open = bool((low <= limits.min).any() and (high >= limits.max).any()) and spec.dtype != torch.uint8
    low, high = low.double(), high.double()
    return None if is_open or not bool(torch.isfinite(low).all() and torch.isfinite(high).all()) else (low, high)


def _common_bounds(spec: TensorSpec) -> tuple[float, float] | None:
    """The least and the greatest bound of all entries, if there are any and they differ."""
    bounds = _bounds(spec)
    if bounds is None:
        return None
    low, high = float(bounds[0].min()), float(bounds[1].max())
    return (low, high) if low < high else None


def _scale(spec: TensorSpec, batch_dims: int) -> Tensor | None:
    """The greatest size of each entry that its bounds allow, shape of one observation; None without bounds."""
    bounds = _bounds(spec)
    if bounds is None:
        return None
    size = torch.maximum(*(bound.abs().expand(spec.shape)[(0,) * batch_dims] for bound in bounds))
    return size.masked_fill(size == 0, 1.0).float()


def _is_float(spec: TensorSpec) -> bool:
    return spec.dtype is not None and spec.dtype.is_floating_point


def _is_integer(spec: TensorSpec) -> bool:
    return spec.dtype is not None and not spec.dtype.is_floating_point and not spec.dtype.is_complex


def _path(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(map(str, key))


def _dotted(key: NestedKey) -> str:
    return ".".join(_path(key))


def _unreadable(key: NestedKey, spec: TensorSpec, all_specs: Composite) -> str:
    leaves = [leaf for leaf in all_specs.keys(True, True) if not BOOKKEEPING.intersection(_path(leaf))]
    others = [_dotted(leaf) for leaf in leaves if leaf != key and not isinstance(all_specs[leaf], NonTensor)]
    kind = "text or another thing that is no tensor" if isinstance(spec, NonTensor) else f"{spec.dtype}"
    kind += "" if isinstance(spec, NonTensor) else f" {list(spec.shape)} ({type(spec).__name__})"
    hint = f"; choose others by observation_keys, from: {', '.join(others)}." if others else "."
    return f"no encoder reads the observation '{_dotted(key)}': it is {kind}{hint}"
