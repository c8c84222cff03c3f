"""Builder of the encoder that fits the observation specs of an environment."""

from __future__ import annotations

import logging
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
from cyborg_torchrl.modules.encoders.pixels import CHOICES, SMALLEST, PixelEncoder
from cyborg_torchrl.modules.encoders.vector import ScaledVector, VectorEncoder
from cyborg_torchrl.registry import did_you_mean

LOGGER = logging.getLogger(__name__)
DISCRETE = ("one_hot", "embedding")
MAIN = (keys.PIXELS, keys.OBSERVATION)
"""Read alone if they exist, the first before the second."""
PREVIOUS = (keys.PREVIOUS_ACTION, keys.PREVIOUS_REWARD, keys.FIRST_STEP)
"""Always read if they exist."""
BOOKKEEPING = frozenset(
    {
        keys.SUCCESS,
        keys.ACTION_MASK,
        keys.EXPLORATION_NOISE,
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
"""Entries that are not observations; compared with the first and the last part of a nested key."""


def build_encoder(
    observation_spec: Composite,
    *,
    batch_dims: int,
    features: int = 64,
    hidden_sizes: Sequence[int] = (),
    observation_keys: Sequence[NestedKey] | None = None,
    convolutions: str = "auto",
    grids: Sequence[NestedKey] | None = None,
    discrete: str = "one_hot",
    embedding_size: int = 16,
    autocast: str | None = None,
    out_key: NestedKey = keys.FEATURES,
    ignored_keys: Sequence[NestedKey] = (),
) -> ObservationEncoder:
    """Build the encoder that fits the observations of an environment.

    | observation | how it is read |
    |---|---|
    | floats of any shape | flattened; embedded together with all other vectors by one map without bias |
    | integers of any shape | the same, divided by their greatest size where they are bounded |
    | categories, several categories | as one-hot vectors, or embeddings |
    | binary, one-hot | as floats |
    | bytes or floats [C, H, W], [H, W, C], stacks [K, ...] of them, with sides of 28 or more | as pictures, by \
a convolutional network; bytes become [0, 1], and floats too if all have the same bounds |
    | bytes [H, W] with sides of 28 or more | as a picture of one channel |
    | smaller integers from 0 to 255 at most with three dimensions | as a grid of object numbers (MiniGrid): \
`GridEncoder` |

    The type does not tell a grid from a picture: MiniGrid's numbers are bytes from 0 to 255, too. So the size decides,
    unless `grids` does. The `describe` method of the result says how each observation is read.

    The parts are added. Float vectors alone are read by a `VectorEncoder`, one image alone by its encoder.

    Args:
        observation_spec: observation spec of the environment.
        batch_dims: number of leading batch dimensions in the shapes of the spec.
        features: F, width of the embedding.
        hidden_sizes: widths of hidden layers for the vectors.
        observation_keys: entries to read: names, or nested keys as tuples or with dots ("camera.left"). The name of a
            nested entry selects all its leaves. None: "pixels" if it exists, else "observation", else all
            observations. "previous_action", "previous_reward" and "first_step" are always read if they exist.
        convolutions: network of pictures: "small", "nature", "impala", or "auto": small up to 48 pixels, else nature.
        grids: observations of integers that are grids of object numbers; all other bytes with sides of 8 or more are
            pictures. None: by the size.
        discrete: how categories are read, "one_hot" or "embedding".
        embedding_size: width of the embedding of a category, or of a number in a grid.
        autocast: "bfloat16" or "float16": computes in it (see `Autocast`); None: float32.
        out_key: entry of the features.
        ignored_keys: entries that are no observations, such as an action mask.

    Raises:
        ValueError: if a key is missing, a choice unknown, or an observation is of a kind that no encoder reads.
    """
    for name, value, choices in (("discrete", discrete, DISCRETE), ("convolutions", convolutions, CHOICES)):
        if value not in choices:
            raise ValueError(f"unknown {name} '{value}': {did_you_mean(value, choices)}")
    ignored = {unravel_key(key) for key in ignored_keys}
    chosen = [key for key in _chosen_keys(observation_spec, observation_keys) if key not in ignored]
    specs = {key: observation_spec[key] for key in chosen}
    if all(_is_float(spec) and len(spec.shape) == batch_dims + 1 and spec.shape[-1] > 0 for spec in specs.values()):
        width = sum(spec.shape[-1] for spec in specs.values())
        network = VectorEncoder(width, features, hidden_sizes)
        descriptions = [_describe(key, spec.shape[batch_dims:], None) for key, spec in specs.items()]
        return ObservationEncoder(network, chosen, out_key, descriptions, autocast)
    grid_keys = None if grids is None else _matching(list(specs), grids)
    readers: list[VectorReader | ImageReader] = []
    descriptions: list[str] = []
    for key, spec in specs.items():
        is_grid = None if grid_keys is None else key in grid_keys
        reader = _build_reader(spec, batch_dims, features, convolutions, is_grid, discrete, embedding_size)
        if reader is None:
            raise ValueError(_unreadable(key, spec, observation_spec))
        if is_grid and not isinstance(reader, GridEncoder):
            raise ValueError(f"grids: '{_dotted(key)}' is no grid of integers from 0 to 255: leave it out.")
        readers.append(reader)
        descriptions.append(_describe(key, spec.shape[batch_dims:], reader))
    is_one_image = len(readers) == 1 and not isinstance(readers[0], VectorReader)
    network: nn.Module = readers[0] if is_one_image else MixedEncoder(readers, features, hidden_sizes)
    return ObservationEncoder(network, chosen, out_key, descriptions, autocast)


class ObservationEncoder(TensorDictModule):
    """An encoder as a TensorDictModule that knows how it reads each observation.

    Args:
        network: the network.
        in_keys: the observations.
        out_key: entry of the features.
        descriptions: one text for each observation.
        autocast: type that the network computes in; None: float32.
    """

    def __init__(
        self,
        network: nn.Module,
        in_keys: Sequence[NestedKey],
        out_key: NestedKey,
        descriptions: Sequence[str],
        autocast: str | None = None,
    ) -> None:
        network = network if autocast is None else Autocast(network, autocast)
        super().__init__(network, in_keys=in_keys, out_keys=[out_key])
        self.descriptions = list(descriptions)

    def describe(self) -> str:
        """Return one line that says how each observation is read.

        Examples:
            >>> import torch
            >>> from torchrl.data import Bounded, Composite, Unbounded
            >>> pixels = Bounded(0, 255, (3, 32, 32), dtype=torch.uint8)
            >>> spec = Composite(camera=pixels, position=Unbounded((2,)))
            >>> build_encoder(spec, batch_dims=0).describe()
            'camera [3, 32, 32] as a picture (small convolutions); position [2] as numbers'
        """
        return "; ".join(self.descriptions)


def _describe(key: NestedKey, shape: torch.Size, reader: nn.Module | None) -> str:
    """Return how an observation is read; a reader of None is that of floats."""
    kind = "numbers"
    if isinstance(reader, PixelEncoder):
        kind = f"a picture ({reader.name} convolutions)"
    elif isinstance(reader, GridEncoder):
        kind = "a grid of object numbers"
    elif isinstance(reader, (OneHotCategories, CategoryEmbedding)):
        kind = "categories"
    return f"{_dotted(key)} {list(shape)} as {kind}"


def _build_reader(
    spec: TensorSpec,
    batch_dims: int,
    features: int,
    convolutions: str,
    is_grid: bool | None,
    discrete: str,
    embedding_size: int,
) -> VectorReader | ImageReader | None:
    """Build the reader of one observation; return None if no reader fits."""
    is_tensor = not isinstance(spec, (NonTensor, Composite)) and len(spec.shape) >= batch_dims
    if not is_tensor or min(spec.shape, default=1) < 1:  # empty, or of unknown length
        return None
    image = _build_image(spec, spec.shape[batch_dims:], features, convolutions, is_grid, embedding_size)
    return image or _build_vector(spec, batch_dims, discrete, embedding_size)


def default_observations(spec: Composite) -> list[NestedKey]:
    """Return the leaves that are read by default: "pixels", else all below "observation", else all observations."""
    known = _observations(spec)
    for key in MAIN:
        leaves = _below(known, key)
        if leaves:
            return leaves
    return known


def _observations(spec: Composite) -> list[NestedKey]:
    """Return the leaves that are observations: all below "pixels" and "observation", whatever they are called."""
    known: list[NestedKey] = [unravel_key(key) for key in spec.keys(True, True)]
    return [key for key in known if _path(key)[0] in MAIN or not BOOKKEEPING.intersection(_path(key))]


def _below(leaves: Sequence[NestedKey], key: NestedKey) -> list[NestedKey]:
    """Return the leaf `key`, or all leaves of the nested entry `key`."""
    path = _path(key)
    return [leaf for leaf in leaves if _path(leaf)[: len(path)] == path]


def _matching(known: Sequence[NestedKey], requested: Sequence[NestedKey], names: str = "") -> list[NestedKey]:
    """Return the leaves that are requested by their names, with dots where they are nested.

    Raises:
        ValueError: if one is missing; it lists `names`, or else all `known` ones.
    """
    chosen: list[NestedKey] = []
    missing: list[NestedKey] = []
    for key in requested:
        path = tuple(key.split(".")) if isinstance(key, str) else key
        leaves = _below(known, key) or _below(known, path)
        chosen += leaves
        if not leaves:
            missing.append(key)
    if missing:
        names = names or ", ".join(map(_dotted, known))
        raise ValueError(f"no observation {missing} in the environment; it has: {names}.")
    return chosen


def _chosen_keys(spec: Composite, requested: Sequence[NestedKey] | None) -> list[NestedKey]:
    """Return the leaves to read, in the requested order or in that of the spec."""
    known: list[NestedKey] = [unravel_key(key) for key in spec.keys(True, True)]
    names = ", ".join(sorted(map(_dotted, _observations(spec))))
    if requested is None:
        chosen = default_observations(spec)
        left_out = [_dotted(key) for key in _observations(spec) if key not in (*chosen, *PREVIOUS)]
        if left_out:
            LOGGER.warning(
                "the observations %s are not read, since there is '%s': name all of them in observation_keys.",
                ", ".join(left_out), _path(chosen[0])[0],
            )  # fmt: skip
    else:
        chosen = _matching(known, requested, names)
    previous = [key for key in PREVIOUS if key in known]
    chosen = list(dict.fromkeys([*chosen, *previous]))  # each once
    if not chosen:
        raise ValueError(f"no observation to read in the environment; it has: {names or '(none)'}.")
    return chosen


def _build_image(
    spec: TensorSpec,
    shape: torch.Size,
    features: int,
    convolutions: str,
    is_grid: bool | None,
    embedding_size: int,
) -> ImageReader | None:
    """Build the encoder of a picture or a grid; return None for any other observation.

    Args:
        spec: the observation's spec.
        shape: its shape without batch dimensions.
        features: width of the features.
        convolutions: network of pictures.
        is_grid: whether it is a grid; None: by its size.
        embedding_size: width of the embedding of a number in a grid.
    """
    if isinstance(spec, (Categorical, OneHot)) or len(shape) not in (2, 3, 4):
        return None
    layout, bounds = image_layout(shape), _common_bounds(spec)
    side = min(layout.height, layout.width)
    is_large_byte_image = spec.dtype == torch.uint8 and side >= (MIN_SIDE if is_grid is None else SMALLEST["small"])
    if is_large_byte_image and not is_grid:
        return PixelEncoder(shape, features, convolutions, byte_bounds=bounds or (0.0, 255.0))
    if _is_float(spec) and side >= MIN_SIDE and len(shape) > 2:
        return PixelEncoder(shape, features, convolutions, float_bounds=bounds or (0.0, 1.0))
    is_possible_grid = _is_integer(spec) and bounds is not None and bounds[0] >= 0 and bounds[1] <= 255
    if is_grid is False or not is_possible_grid or not (is_grid or len(shape) == 3):
        return None
    return GridEncoder(shape, features, int(bounds[1]) + 1, embedding_size)


def _build_vector(spec: TensorSpec, batch_dims: int, discrete: str, embedding_size: int) -> VectorReader | None:
    """Build the module that turns an observation into a vector; return None if there is none."""
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
    """Return the bounds of all entries as floats; None without finite bounds that are tighter than the dtype's."""
    low, high = getattr(spec.space, "low", None), getattr(spec.space, "high", None)
    if low is None or high is None or spec.dtype == torch.bool:
        return None
    limits = torch.finfo(spec.dtype) if _is_float(spec) else torch.iinfo(spec.dtype)
    is_open = bool((low <= limits.min).any() and (high >= limits.max).any()) and spec.dtype != torch.uint8
    low, high = low.double(), high.double()
    return None if is_open or not bool(torch.isfinite(low).all() and torch.isfinite(high).all()) else (low, high)


def _common_bounds(spec: TensorSpec) -> tuple[float, float] | None:
    """Return the least and the greatest bound of all entries; None if there are none or they are equal."""
    bounds = _bounds(spec)
    if bounds is None:
        return None
    low, high = float(bounds[0].min()), float(bounds[1].max())
    return (low, high) if low < high else None


def _scale(spec: TensorSpec, batch_dims: int) -> Tensor | None:
    """Return the largest absolute value that the bounds of each entry allow, [*shape]; None without bounds."""
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
