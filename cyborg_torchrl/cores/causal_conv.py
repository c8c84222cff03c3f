"""The short causal convolution in front of a state space model, with its history as an explicit state."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def causal_conv_step(
    x: Float[Tensor, "B D"],
    weight: Float[Tensor, "D W"],
    bias: Float[Tensor, " D"] | None,
    history: Float[Tensor, "B D W"],
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D W"]]:
    """One step of a depthwise convolution over the last W inputs.

    Returns what it reads, and the next history: the last W inputs, the newest last.
    """
    history = torch.cat([history[:, :, 1:], x.unsqueeze(-1)], -1)
    y = torch.linalg.vecdot(history, weight)
    return y if bias is None else y + bias, history


def causal_conv(
    x: Float[Tensor, "T B D"],
    weight: Float[Tensor, "D W"],
    bias: Float[Tensor, " D"] | None,
    history: Float[Tensor, "B D W"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B D W"],
) -> tuple[Float[Tensor, "T B D"], Float[Tensor, "B D W"]]:
    """Depthwise causal convolution over a sequence, restarted where episodes begin.

        y_t = bias + sum_k weight_{W-1-k} x_{t-k},    x before an episode := its initial history

    Args:
        x: inputs.
        weight: taps, the newest last.
        bias: added to every output; None: nothing is.
        history: the last W inputs before the first step, the newest last.
        is_init: where an episode begins; whatever was before it, NaN too, is forgotten.
        initial: the history that episodes begin from.

    Returns:
        The outputs, and the history after the last step.
    """
    steps, width = x.shape[0], weight.shape[-1]
    first = is_init[0, :, None, None]
    past = torch.where(first, initial, history)[:, :, 1:].permute(2, 0, 1)
    padded = torch.cat([past, x])  # [W - 1 + T, B, D]
    if not bool(is_init[1:].any()):
        y: Tensor = _Convolution.apply(padded, weight, bias)  # pyright: ignore[reportAssignmentType]
        return y, padded[-width:].permute(1, 2, 0)
    age = _steps_since_reset(is_init, never=steps + width)
    taps = [padded[width - 1 - lag : width - 1 - lag + steps] for lag in range(width)]
    taps = [_restart_tap(tap, lag, age, initial) for lag, tap in enumerate(taps)]
    y = sum(tap * weight[:, -1 - lag] for lag, tap in enumerate(taps))  # pyright: ignore[reportAssignmentType]
    return y if bias is None else y + bias, torch.stack([tap[-1] for tap in reversed(taps)], -1)


class _Convolution(torch.autograd.Function):
    """y_t = bias + sum_k weight_k padded_{t+k}, without a tensor for each product."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, padded: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(padded, weight)
        ctx.has_bias = bias is not None  # pyright: ignore[reportAttributeAccessIssue]
        width = weight.shape[-1]
        steps = padded.shape[0] - width + 1
        y = padded[:steps] * weight[:, 0]
        for k in range(1, width):
            y.addcmul_(padded[k : k + steps], weight[:, k])
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: FunctionCtx, grad_y: Tensor
    ) -> tuple[Tensor | None, ...]:
        padded, weight = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        steps, width = grad_y.shape[0], weight.shape[-1]
        grad_padded, work = torch.zeros_like(padded), torch.empty_like(grad_y)
        grad_weight: list[Tensor] = []
        for k in range(width):
            grad_padded[k : k + steps].addcmul_(grad_y, weight[:, k])
            grad_weight.append(torch.mul(grad_y, padded[k : k + steps], out=work).sum((0, 1)))
        grad_bias = grad_y.sum((0, 1)) if ctx.has_bias else None  # pyright: ignore[reportAttributeAccessIssue]
        return grad_padded, torch.stack(grad_weight, -1), grad_bias


def _steps_since_reset(is_init: Bool[Tensor, "T B"], never: int) -> Tensor:
    """Steps since the last reset after the first step, [T, B]; at least `never` where there was none."""
    index = torch.arange(is_init.shape[0], device=is_init.device).unsqueeze(1)
    is_later = is_init & (index > 0)
    last = torch.where(is_later, index, -never).cummax(0).values
    return index - last


def _restart_tap(tap: Tensor, lag: int, age: Tensor, initial: Tensor) -> Tensor:
    """The inputs `lag` steps ago, where those lie before a reset taken from the initial history."""
    for since in range(lag):
        tap = torch.where((age == since).unsqueeze(-1), initial[:, :, since - lag], tap)
    return tap
