"""Training of one agent by several processes: each rank's share, collective operations, and joining the processes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor

from cyborg_torchrl.config import ConfigError

T = TypeVar("T")
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun, and other launchers of torch.distributed, set for each process."""
RANK_SEEDS = 10_007
"""Difference between the seeds of two ranks, larger than the number of workers of one rank."""
PATIENCE = timedelta(days=365)
"""How long ranks wait for the first one while it evaluates. A rank that has ended is noticed at once."""


class PeerLostError(RuntimeError):
    """Another process of this run has ended, so collective operations fail."""


class Ranks:
    """The processes that train one agent together, each with its environments; by default this process alone.

    The methods are collective operations: all ranks call them, in the same order and with tensors of the same shapes,
    and get the same result. The result is on the device of the argument. All methods raise PeerLostError if another
    process has ended.

    Args:
        rank: number of this process.
        size: number of processes; they form torch.distributed's default group.
        device: device for communication: a CUDA device for nccl, the CPU for gloo.
        waiting_group: gloo group of the same processes, with a long timeout, for objects of the first rank.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu", waiting_group: Any = None
    ) -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self._waiting_group = waiting_group

    @property
    def is_first(self) -> bool:
        """True for the process that writes, prints and evaluates."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all ranks, each with the same weight."""
        return self.sum(values) / self.size

    def maximum(self, values: Tensor) -> Tensor:
        """Return the maximum over all ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def weighted_means(self, tensors: Sequence[Tensor], weight: float) -> list[Tensor] | None:
        """Return the means of tensors over all ranks, each with its weight; None if all weights are zero.

        Sends one message.
        """
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        total = self.sum(torch.cat([flat * weight, flat.new_tensor([weight])]))
        if not total[-1]:
            return None
        parts = (total[:-1] / total[-1]).split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]

    def moments(self, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the number, mean and variance (divided by number - 1) of the items of all ranks, in float64.

        Ranks may have different numbers of items. Without items, mean and variance are NaN.
        """
        items = items.detach().double().reshape(-1)
        number, total = self.sum(torch.stack([items.new_tensor(items.numel()), items.sum()]))
        mean = total / number
        return number, mean, self.sum((items - mean).square().sum()) / (number - 1)

    def standardized(self, x: Tensor, mask: Tensor | None = None, min_std: float = 1e-6) -> Tensor:
        """Return `x` with mean 0 and standard deviation 1 over the entries of all ranks where the mask is true."""
        number, mean, variance = self.moments(x if mask is None else x[mask])
        if number < 2:
            return x
        return ((x - mean) / variance.sqrt().clamp_min(min_std)).to(x.dtype)

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Copy the first rank's values into the tensors of all other ranks."""
        if self.size == 1:
            return
        with _peer_errors(), torch.no_grad():
            for tensor in tensors:
                sent = tensor.detach().to(self.device, copy=True).contiguous()
                dist.broadcast(sent, src=0)
                tensor.copy_(sent)

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` in the first process. Return its result, or raise its error, in all processes.

        The others wait for it as long as it takes. Result and error are sent as pickles.
        """
        if self.size == 1:
            return make()
        outcome: list[Any] = [None]
        if self.is_first:
            try:
                outcome = [(make(), None)]
            except Exception as error:  # the others wait, and must not wait for ever
                outcome = [(None, error)]
        with _peer_errors():
            dist.broadcast_object_list(outcome, src=0, group=self._waiting_group)
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    def gather_objects(self, content: Any) -> list[Any]:
        """Return the objects of all ranks, in their order, to the first rank; [] to all others."""
        if self.size == 1:
            return [content]
        contents: list[Any] | None = [None] * self.size if self.is_first else None
        with _peer_errors():
            dist.gather_object(content, contents)
        return contents or []

    def _reduce(self, values: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return values
        total = values.detach().to(self.device, copy=True).contiguous()
        with _peer_errors():
            dist.all_reduce(total, operation)
        return total.to(values.device)


def is_launched_with_others() -> bool:
    """Return whether a launcher has started this process as one of several."""
    return all(name in os.environ for name in VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def launched_rank() -> int:
    """Return the number of this process among those of its launcher; 0 if it is alone."""
    return int(os.environ["RANK"]) if is_launched_with_others() else 0


@contextmanager
def joined_ranks(device: str) -> Generator[Ranks]:
    """Join the processes of a launcher; without a launcher, this process is alone.

    On CUDA devices they use nccl, and each process takes the device of its number on the machine. On CPUs they use
    gloo.

    Args:
        device: "cpu", "cuda" or "auto". This process's CUDA device becomes the current one.

    Raises:
        ConfigError: if there are more processes than devices, or the processes do not find each other.
    """
    if not is_launched_with_others():
        yield Ranks()
        return
    is_on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    rank_device = torch.device("cpu") if is_on_cpu else _cuda_device_of_process(device)
    is_new_group = not dist.is_initialized()
    if is_new_group:
        try:
            dist.init_process_group("gloo" if is_on_cpu else "nccl")
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"the processes of this run do not find each other: {_first_line(error)}") from None
    try:
        waiting_group = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(dist.get_rank(), dist.get_world_size(), rank_device, waiting_group)
    finally:
        if is_new_group:
            dist.destroy_process_group()


def _cuda_device_of_process(name: str) -> torch.device:
    size = int(os.environ["WORLD_SIZE"])
    index = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if name not in ("cuda", "auto"):
        raise ConfigError(f"train.device={name} is one device, for {size} processes; use train.device=cuda, one each.")
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"process {index} of this machine has no CUDA device: there are {torch.cuda.device_count()}; "
            "start as many processes as there are devices, or use train.device=cpu."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def _peer_errors() -> Generator[None]:
    """Raise PeerLostError, with one line, for an error of a collective operation."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(
            f"another process of this run has ended; if it said why, see there ({_first_line(error)})"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def share_of_rank(cfg: DictConfig, ranks: Ranks) -> DictConfig:
    """Return the configuration of one rank: its part of the environments and steps, and its seed.

    Raises:
        ConfigError: if environments, or their worker processes, cannot be shared evenly.
    """
    if ranks.size == 1:
        return cfg
    cfg = copy.deepcopy(cfg)
    for key, number in (("num_envs", cfg.env.get("num_envs", 1)), ("workers", cfg.env.get("workers") or 0)):
        if number % ranks.size:
            nearest = max(1, round(number / ranks.size)) * ranks.size
            raise ConfigError(
                f"env.{key} = {number} cannot be shared evenly by the {ranks.size} processes of this run; the nearest "
                f"that can is {nearest}."
            )
        if key in cfg.env:
            cfg.env[key] = number // ranks.size
    cfg.train.total_timesteps = max(1, cfg.train.total_timesteps // ranks.size)
    cfg.train.seed += ranks.rank * RANK_SEEDS
    return cfg
