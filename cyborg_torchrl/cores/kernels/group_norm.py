"""The norm over groups of channels in C++, as a torch operator."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cyborg_torchrl.cores.kernels.native import function, integers, needs_operator, pointers


def group_norm_cpp(
    x: Float[Tensor, "*B D"], scales: Float[Tensor, " D"] | None, groups: int, eps: float
) -> Float[Tensor, "*B D"]:
    """Return the output of `TimescaleNorm`. It runs on as many threads as torch uses.

    Args:
        x: rows.
        scales: factors of the channels before the norm. None: no factors.
        groups: number of groups, a divisor of D.
        eps: floor of the mean square.

    Raises:
        RuntimeError: if the C++ kernels were not built.
    """
    x = x.contiguous()
    # Without a gradient, skip the overhead of a torch operator: it counts in steps of small batches.
    run = _forward if needs_operator([x]) else _run
    return run(x, scales, groups, eps)


def added_layer_norms_cpp(
    first: Float[Tensor, "B D"], second: Float[Tensor, "B D"], norms: tuple[nn.LayerNorm, nn.LayerNorm]
) -> Float[Tensor, "B D"]:
    """Return the sum of two layer norms of different inputs, without a gradient.

    Args:
        first: input of the first norm.
        second: input of the second norm.
        norms: two norms with weights and biases, and the same eps.
    """
    first, second = first.contiguous(), second.contiguous()
    total = torch.empty_like(first)
    # `norm.weight` would go through Module.__getattr__, which takes longer than the norms themselves.
    one, other = (norm._parameters for norm in norms)
    inputs = pointers(first, one["weight"], one["bias"], second, other["weight"], other["bias"])
    rows, size = first.shape
    threads = torch.get_num_threads()
    function("added_norms", first.dtype)(rows, size, threads, norms[0].eps, inputs, total.data_ptr())
    return total


def _arguments(x: Tensor, scales: Tensor | None, groups: int, eps: float) -> tuple[Any, ...]:
    channels = x.shape[-1]
    # All leading dimensions count as rows: the norm treats steps and environments alike.
    sizes = integers(x.numel() // channels, channels, channels // groups)
    return sizes, torch.get_num_threads(), eps, x.data_ptr(), None if scales is None else scales.data_ptr()


def _run(x: Tensor, scales: Tensor | None, groups: int, eps: float) -> Tensor:
    y = torch.empty_like(x)
    function("norm", x.dtype)(*_arguments(x, scales, groups, eps), y.data_ptr())
    return y


_forward = torch.library.custom_op(
    "cyborg_torchrl::group_norm",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor? scales, int groups, float eps) -> Tensor",
)(_run)


@torch.library.custom_op(
    "cyborg_torchrl::group_norm_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad_y, Tensor x, Tensor? scales, int groups, float eps) -> Tensor",
)
def _backward(grad_y: Tensor, x: Tensor, scales: Tensor | None, groups: int, eps: float) -> Tensor:
    # C++ recomputes the norm from x, so the forward pass stores nothing more than its input.
    grad_x = torch.empty_like(x)
    function("norm_backward", x.dtype)(*_arguments(x, scales, groups, eps), grad_y.data_ptr(), grad_x.data_ptr())
    return grad_x


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scales, ctx.groups, ctx.eps = inputs
    ctx.has_scales = scales is not None
    ctx.save_for_backward(x, *([scales] if ctx.has_scales else []))


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, scales = ctx.saved_tensors if ctx.has_scales else (*ctx.saved_tensors, None)
    return _backward(grad_y.contiguous(), x, scales, ctx.groups, ctx.eps), None, None, None


def _fake_forward(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(grad_y: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


_forward.register_fake(_fake_forward)
_backward.register_fake(_fake_backward)
_forward.register_autograd(_gradients, setup_context=_setup_context)
