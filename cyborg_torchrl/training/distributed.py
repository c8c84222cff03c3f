"""Processes that train one agent together: what they add up, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, and other launchers of torch.distributed, tell each process."""


class LaunchError(ValueError):
    """Processes that cannot train together; the message is one line that says why."""


class PeerLostError(RuntimeError):
    """Another of the processes has ended, so that nothing can be added up any more."""


class Ranks:
    """The processes that train one agent, each on environments of its own; one alone by default.

    Its methods are collectives: all ranks call them, in the same order and with tensors of the same shapes, and get
    the same result, which is on the device of what they gave.

    Args:
        rank: which of them this one is.
        size: how many there are; torch.distributed's default group is theirs.
        device: where tensors lie on their way: a CUDA device for nccl, the CPU for gloo.

    Raises (all methods): PeerLostError: if another process has ended.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)

    @property
    def is_first(self) -> bool:
        """Whether it is this process that writes, prints and evaluates."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all ranks, each with the same weight."""
        return self.sum(values) / self.size

    def maximum(self, values: Tensor) -> Tensor:
        """The largest over all ranks."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def averaged(self, tensors: Sequence[Tensor], weight: float) -> list[Tensor] | None:
        """The means of some tensors over all ranks, each with its weight; None if nobody has any. One message."""
        own = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        total = self.sum(torch.cat([own * weight, own.new_tensor([weight])]))
        if not total[-1]:
            return None
        parts = (total[:-1] / total[-1]).split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]

    def moments(self, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Number, mean and variance (divided by number - 1) of all ranks' items, of which each may have another number.

        In double precision; mean and variance of nothing are not a number.
        """
        items = items.detach().double().reshape(-1)
        number, total = self.sum(torch.stack([items.new_tensor(items.numel()), items.sum()]))
        mean = total / number
        return number, mean, self.sum((items - mean).square().sum()) / (number - 1)

    def standardized(self, x: Tensor, mask: Tensor | None = None, min_std: float = 1e-6) -> Tensor:
        """`x` with mean 0 and standard deviation 1 over all ranks' entries where the mask is true (all, if None)."""
        number, mean, variance = self.moments(x if mask is None else x[mask])
        if number < 2:
            return x
        return ((x - mean) / variance.sqrt().clamp_min(min_std)).to(x.dtype)

    def give_to_all(self, tensors: Iterable[Tensor]) -> None:
        """Writes the first rank's values into the tensors of all others."""
        if self.size == 1:
            return
        with _peers(), torch.no_grad():
            for tensor in tensors:
                sent = tensor.detach().to(self.device, copy=True).contiguous()
                dist.broadcast(sent, src=0)
                tensor.copy_(sent)

    def of_first(self, content: Any) -> Any:
        """The first rank's object, which has to be one that can be pickled."""
        if self.size == 1:
            return content
        contents = [content]
        with _peers():
            dist.broadcast_object_list(contents, src=0, device=self.device)
        return contents[0]

    def of_all(self, content: Any) -> list[Any]:
        """The objects of all ranks, in their order; at the first rank alone, nothing elsewhere."""
        if self.size == 1:
            return [content]
        contents: list[Any] | None = [None] * self.size if self.is_first else None
        with _peers():
            dist.gather_object(content, contents)
        return contents or []

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return values
        total = values.detach().to(self.device, copy=True).contiguous()
        with _peers():
            dist.all_reduce(total, operation)
        return total.to(values.device)


class JointStep:
    """An optimiser step of all ranks together: gradients, and figures of the step, become the means over all.

    Args:
        ranks: the processes.
        parameters: what is trained, with gradients of the same dtype; one without a gradient gets zeros.
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[nn.Parameter]) -> None:
        self.ranks, self.parameters = ranks, parameters
        self._names: list[str] = []

    def averaged(self, figures: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
        """Takes the means, in one message.

        Args:
            figures: of the loss, the same on all ranks, each a mean over the steps that the gradient is a mean over;
                "ratio_error" stays as it is. None at all for a rank that has nothing to add any more.
            weight: of this rank: trained steps.

        Returns:
            The means of the figures; empty if no rank had anything to add, and gradients are then left alone.
        """
        self._names = sorted(set(figures) - {"ratio_error"}) or self._names
        zero = torch.zeros((), device=self.parameters[0].device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        means = self.ranks.averaged([*gradients, *(figures.get(name, zero) for name in self._names)], weight)
        if means is None:
            return {}
        for parameter, gradient in zip(self.parameters, means, strict=False):
            parameter.grad = gradient
        return dict(zip(self._names, means[len(self.parameters) :], strict=True))


def is_launched_with_others() -> bool:
    """Whether a launcher has started this process as one of several that belong together."""
    return all(name in os.environ for name in VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def launched_rank() -> int:
    """Which of the processes this one is; 0 if it is alone."""
    return int(os.environ["RANK"]) if is_launched_with_others() else 0


@contextmanager
def joined_ranks(device: str) -> Generator[Ranks]:
    """The processes that a launcher has started together; this one alone if it has started no others.

    Over nccl where they train on CUDA devices, each on the one of its number on the machine, else over gloo.

    Args:
        device: "cpu", "cuda" or "auto"; the present CUDA device becomes the one of this process.

    Raises:
        LaunchError: if there are more processes than devices, or they do not find each other.
    """
    if not is_launched_with_others():
        yield Ranks()
        return
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device("cpu") if kind == "cpu" else _own_cuda_device(kind)
    is_ours = not dist.is_initialized()
    if is_ours:
        try:
            dist.init_process_group("gloo" if kind == "cpu" else "nccl")
        except (RuntimeError, ValueError) as error:
            raise LaunchError(f"the processes of this run do not find each other: {_first_line(error)}") from None
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), place)
    finally:
        if is_ours:
            dist.destroy_process_group()


def _own_cuda_device(kind: str) -> torch.device:
    size, index = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if kind != "cuda":
        raise LaunchError(f"train.device={kind} is one device, for {size} processes; use train.device=cuda, one each.")
    if index >= torch.cuda.device_count():
        raise LaunchError(
            f"process {index} of this machine has no CUDA device of its own: there are {torch.cuda.device_count()}; "
            "start as many processes as there are devices, or use train.device=cpu."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def _peers() -> Generator[None]:
    """Says in one line that another process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(
            f"another process of this run has ended; if it said why, see there ({_first_line(error)})"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
