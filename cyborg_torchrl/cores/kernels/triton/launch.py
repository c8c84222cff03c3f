"""Launches of Triton kernels by name, outside of autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Launch = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[int | float]], None]
_LAUNCHES: dict[str, Launch] = {}


def launch(name: str) -> Callable[[Launch], Launch]:
    """Register a function that launches a kernel, given its inputs, outputs and numbers."""

    def register(function: Launch) -> Launch:
        _LAUNCHES[name] = function
        return function

    return register


def run(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], numbers: Sequence[int | float] = ()) -> None:
    """Launch a kernel, outside of autograd.

    Args:
        name: name of the launch.
        inputs: contiguous tensors on one device.
        outputs: contiguous tensors on the same device, which the kernel writes.
        numbers: other numbers that the launch reads.
    """
    if torch.compiler.is_compiling():
        # torch.compile sees one operator. Elsewhere we avoid the operator's overhead.
        _operator(name, inputs, outputs, numbers)
        return
    # A kernel starts on the current GPU, which may be another one than that of the tensors.
    with torch.cuda.device_of(inputs[0]):
        _LAUNCHES[name](inputs, outputs, numbers)


_operator = torch.library.custom_op(
    "cyborg_torchrl::run_triton",
    mutates_args=("outputs",),
    schema="(str name, Tensor[] inputs, Tensor(a!)[] outputs, float[] numbers) -> ()",
)(run)


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return (a + b - 1) // b


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
