"""The read-out of the Mamba family: normalise the memory's output, add the present, and apply the gate."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from cyborg_torchrl.cores.blocks import blocks
from cyborg_torchrl.cores.kernels.triton.gated_readout import gated_readout_triton
from cyborg_torchrl.cores.kernels.triton.loading import is_triton
from cyborg_torchrl.cores.timescale import TimescaleNorm


class _GatedReadout(torch.autograd.Function):
    """out = (norm(y) + skip u) z sigmoid(z), block by block. The backward pass recomputes all but the inputs."""

    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, u: Tensor, z: Tensor, skip: Tensor, norm: TimescaleNorm | None) -> Tensor:
        out = torch.empty_like(y)
        for span in blocks(y):
            total, _ = _normalize(y[span], norm)
            total = torch.addcmul(total, u[span], skip)
            torch.mul(torch.nn.functional.silu(z[span]), total, out=out[span])
        ctx.save_for_backward(y, u, z, skip)
        ctx.norm = norm
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        y, u, z, skip = ctx.saved_tensors
        norm: TimescaleNorm | None = ctx.norm
        grad_y, grad_u, grad_z = torch.empty_like(y), torch.empty_like(y), torch.empty_like(y)
        grad_skip = torch.zeros_like(skip)
        for span in blocks(y):
            normed, factors = _normalize(y[span], norm)
            z_k, u_k, grad_k = z[span], u[span], grad_out[span]
            total = torch.addcmul(normed, u_k, skip)
            torch.ops.aten.silu_backward.grad_input(total.mul_(grad_k), z_k, grad_input=grad_z[span])
            grad_total = torch.nn.functional.silu(z_k).mul_(grad_k)
            torch.mul(grad_total, skip, out=grad_u[span])
            grad_skip += torch.mul(grad_total, u_k, out=total).sum((0, 1))
            if norm is None or factors is None:
                grad_y[span] = grad_total
            else:
                norm.backward(grad_total, normed, factors, out=grad_y[span])
        return grad_y, grad_u, grad_z, grad_skip, None


def _normalize(y: Tensor, norm: TimescaleNorm | None) -> tuple[Tensor, Tensor | None]:
    if norm is None:
        return y, None
    factors = norm.factors(y)
    return y * factors, factors


def gated_readout(
    y: Float[Tensor, "T B D"],
    u: Float[Tensor, "T B D"],
    z: Float[Tensor, "T B D"],
    skip: Float[Tensor, " D"],
    readout: nn.Module,
) -> Float[Tensor, "T B D"]:
    """Normalise the output of a memory, add the present, and apply the gate.

        out_t = (readout(y_t) + skip u_t) * silu(z_t)

    The norm does not include the present, which is larger and would hide the past.

    Args:
        y: output of the memory.
        u: current input of the memory.
        z: input of the gate.
        skip: weight of the present.
        readout: a `TimescaleNorm`, or another module, which is called first.

    Returns:
        The output. Gradients reach every argument. Second derivatives are not supported.

    Cost: O(T B D) time. The gradient stores only the three inputs.
    """
    norm = readout if isinstance(readout, TimescaleNorm) else None
    if norm is None:
        y = readout(y)
    if is_triton(y):
        return _with_kernel(y, u, z, skip, norm)
    return _GatedReadout.apply(y, u, z, skip, norm)


def gated_readout_step(
    y: Float[Tensor, "B D"],
    u: Float[Tensor, "B D"],
    z: Float[Tensor, "B D"],
    skip: Float[Tensor, " D"],
    readout: nn.Module,
) -> Float[Tensor, "B D"]:
    """Return the gated read-out of one step. It rounds as a step of `gated_readout`."""
    if is_triton(y):  # the kernel of sequences
        norm = readout if isinstance(readout, TimescaleNorm) else None
        return _with_kernel(readout(y) if norm is None else y, u, z, skip, norm)
    return torch.addcmul(readout(y), skip, u) * F.silu(z)


def _with_kernel(y: Tensor, u: Tensor, z: Tensor, skip: Tensor, norm: TimescaleNorm | None) -> Tensor:
    if norm is None:
        return gated_readout_triton(y, u, z, skip, None, 0, 0.0)
    return gated_readout_triton(y, u, z, skip, norm.timescales, norm.groups, norm.eps)
