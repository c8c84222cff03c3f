"""Attention over the last steps in C++: a layer's step, and a sequence with its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cyborg_torchrl.cores.attention_layer import AttentionLayer
from cyborg_torchrl.cores.kernels.native import is_native, run, threads_for


def layer_step(
    layer: AttentionLayer,
    x: Float[Tensor, "B W"],
    clock: Float[Tensor, "B W"] | None,
    age: Float[Tensor, " B"],
    keys: Float[Tensor, "B H D K"],
    values: Float[Tensor, "B H K D"],
) -> Float[Tensor, "B W"]:
    """Return the output of a layer for one step, without gradients, and write the step's keys and values.

    Args:
        layer: the layer.
        x: its input.
        clock: added to the input of queries and keys, but not to that of values; None if there is no clock.
        age: steps of the episode so far, the present one included; earlier ones are left out.
        keys: keys, with room for the newest at the end; a view of a longer buffer [B, H, D, C].
        values: values, with room for the newest at the end; a view of a buffer [B, H, C, D].
    """
    if not is_native(x) or keys.dtype is not x.dtype or layer.gates or layer.turns is not None:
        q, keys[..., -1], values[..., -1, :] = layer.project(x, clock, age)
        products = torch.einsum("bhd,bhdk->bhk", q, keys) * q.shape[-1] ** -0.5 + layer.bias.flip(-1)
        is_before_start = torch.arange(keys.shape[-1] - 1, -1, -1) >= age.view(-1, 1, 1)
        weights = products.masked_fill(is_before_start, -torch.inf).softmax(-1)
        return layer.finish(x, torch.einsum("bhk,bhkd->bhd", weights, values))
    norm, norm_2 = layer.norms
    linear, _, linear_2 = layer.mlp
    inputs = [
        x, age, norm.weight, layer.queries_keys.weight, layer.values.weight, layer.gain, layer.bias,
        layer.output.weight, layer.output.bias, norm_2.weight, norm_2.bias,
        linear.weight, linear.bias, linear_2.weight, linear_2.bias, *([] if clock is None else [clock]),
    ]  # fmt: skip
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    sizes = (keys.shape[-1], x.shape[0], x.shape[1], keys.stride(2), keys.shape[1])
    contiguous = [each.contiguous() for each in inputs]  # pyright: ignore[reportCallIssue]
    run("attention_layer", sizes, contiguous, [y, keys, values], eps=1e-5)
    return y


def attend_sequence(
    q: Float[Tensor, "B H T D"],
    keys: Float[Tensor, "B H D K"],
    values: Float[Tensor, "B H K D"],
    bias: Float[Tensor, "H C"],
    age: Float[Tensor, "B T"],
) -> Float[Tensor, "B H T D"]:
    """Do the same as `attention.attend`, in C++. It runs on as many threads as torch uses.

    Raises:
        RuntimeError: if the C++ kernels were not built.
    """
    return _WindowAttention.apply(*(tensor.contiguous() for tensor in (q, keys, values, bias, age)))


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *tensors: Tensor) -> Tensor:
        q = tensors[0]
        read, log_sum = torch.empty_like(q), q.new_empty(q.shape[:-1])
        run("attend", _sizes(tensors), tensors, [read, log_sum], eps=q.shape[-1] ** -0.5)
        ctx.save_for_backward(*tensors, read, log_sum)
        return read

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_read: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, values, bias, *_ = tensors = ctx.saved_tensors
        threads = threads_for(q.shape[0] * q.shape[1])
        grads = [torch.empty_like(q), torch.empty_like(keys), torch.empty_like(values)]
        grads.append(bias.new_zeros(threads, *bias.shape))  # C++ adds to it, and overwrites the others
        inputs = [grad_read.contiguous(), *tensors]
        run("attend_backward", _sizes(tensors), inputs, grads, eps=q.shape[-1] ** -0.5, threads=threads)
        return *grads[:3], grads[3].sum(0), None


def _sizes(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    batch, heads, length, size = tensors[0].shape
    return length, batch * heads, size, tensors[2].shape[2], heads
