"""The short causal convolution before a state space model, with its input history as an explicit state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from cyborg_torchrl.cores.blocks import blocks
from cyborg_torchrl.cores.kernels.triton.causal_conv import WIDTH, causal_conv_triton
from cyborg_torchrl.cores.kernels.triton.loading import is_triton


def causal_conv_step(
    x: Float[Tensor, "B D"],
    weight: Float[Tensor, "D W"],
    bias: Float[Tensor, " D"] | None,
    history: Float[Tensor, "B D W"],
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D W"]]:
    """Take one step of a depthwise convolution over the last W inputs, followed by silu.

    Return the output and the next history: the last W inputs, newest last.
    """
    if weight.shape[-1] == WIDTH and is_triton(x):  # the kernel of sequences, so both round alike
        is_init = torch.zeros(1, x.shape[0], dtype=torch.bool, device=x.device)
        y, following = causal_conv_triton(x.unsqueeze(0), weight, bias, history, is_init, history)
        return y.squeeze(0), following
    window = torch.cat([history[:, :, 1:].permute(2, 0, 1), x.unsqueeze(0)])
    return _silu_of_sum(window.unbind(0), weight, bias), window.permute(1, 2, 0)


def causal_conv(
    x: Float[Tensor, "T B D"],
    weight: Float[Tensor, "D W"],
    bias: Float[Tensor, " D"] | None,
    history: Float[Tensor, "B D W"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B D W"],
) -> tuple[Float[Tensor, "T B D"], Float[Tensor, "B D W"]]:
    """Run a depthwise causal convolution and silu over a sequence, and restart where episodes begin.

        y_t = silu(bias + sum_k weight_{W-1-k} x_{t-k}),    x before an episode := its initial history

    Args:
        x: inputs.
        weight: taps, newest last.
        bias: added to every output. None: no bias.
        history: the last W inputs before the first step, newest last.
        is_init: true where an episode begins. The state before it is dropped there, NaN included.
        initial: the history at the start of an episode.

    Returns:
        The outputs, and the history after the last step.
    """
    steps, width = x.shape[0], weight.shape[-1]
    if width == WIDTH and is_triton(x):
        return causal_conv_triton(x, weight, bias, history, is_init, initial)
    first = is_init[0, :, None, None]
    past = torch.where(first, initial, history)[:, :, 1:].permute(2, 0, 1)
    padded = torch.cat([past, x])  # [W - 1 + T, B, D]
    if not bool(is_init[1:].any()):
        y: Tensor = _Convolution.apply(padded, weight, bias)
        return y, padded[-width:].permute(1, 2, 0)
    age = _steps_since_reset(is_init, never=steps + width)
    window = [padded[k : k + steps] for k in range(width)]
    window = [_restart_tap(inputs, width - 1 - k, age, initial) for k, inputs in enumerate(window)]
    return _silu_of_sum(window, weight, bias), torch.stack([inputs[-1] for inputs in window], -1)


def _silu_of_sum(window: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return silu of the weighted sum. The oldest input comes first, as in `_Convolution`, so both round alike."""
    taps = weight.t().contiguous().unbind(0)
    y = window[0] * taps[0]
    for inputs, tap in zip(window[1:], taps[1:], strict=True):
        y = torch.addcmul(y, inputs, tap)
    return F.silu(y if bias is None else y + bias)


class _Convolution(torch.autograd.Function):
    """y_t = silu(bias + sum_k weight_k padded_{t+k}), block by block, without storing each product."""

    @staticmethod
    def forward(ctx: FunctionCtx, padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        taps = weight.t().contiguous()
        ctx.save_for_backward(padded, taps, bias)  # pyright: ignore[reportArgumentType]
        steps = padded.shape[0] - taps.shape[0] + 1
        y = torch.empty_like(padded[:steps])
        for span in blocks(y):
            sums = _weighted_sum(padded, span, taps, bias)
            torch.ops.aten.silu.out(sums, out=y[span])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        padded, taps, bias = ctx.saved_tensors
        grad_padded, grad_taps = torch.zeros_like(padded), torch.zeros_like(taps)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for span in blocks(grad_y):
            sums = _weighted_sum(padded, span, taps, bias)
            grad = torch.ops.aten.silu_backward(grad_y[span], sums)
            for k in range(taps.shape[0]):
                steps = slice(span.start + k, span.stop + k)
                grad_padded[steps].addcmul_(grad, taps[k])
                grad_taps[k] += torch.mul(grad, padded[steps], out=sums).flatten(0, 1).sum(0)
            if grad_bias is not None:
                grad_bias += grad.sum((0, 1))
        return grad_padded, grad_taps.t(), grad_bias


def _weighted_sum(padded: Tensor, span: slice, taps: Tensor, bias: Tensor | None) -> Tensor:
    sums = padded[span] * taps[0]
    for k in range(1, taps.shape[0]):
        sums.addcmul_(padded[span.start + k : span.stop + k], taps[k])
    return sums if bias is None else sums.add_(bias)


def _steps_since_reset(is_init: Bool[Tensor, "T B"], never: int) -> Tensor:
    """Return steps since the last reset after the first step, [T, B]. Without such a reset it is `never` or more."""
    index = torch.arange(is_init.shape[0], device=is_init.device).unsqueeze(1)
    is_later = is_init & (index > 0)
    last = torch.where(is_later, index, -never).cummax(0).values
    return index - last


def _restart_tap(tap: Tensor, lag: int, age: Tensor, initial: Tensor) -> Tensor:
    """Return the inputs `lag` steps ago. Inputs from before a reset come from the initial history."""
    for since in range(lag):
        tap = torch.where((age == since).unsqueeze(-1), initial[:, :, since - lag], tap)
    return tap
