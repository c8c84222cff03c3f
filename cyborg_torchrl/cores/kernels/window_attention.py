"""Attention over the last steps on a CPU: a layer's step in C++, and a sequence without copies of its windows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from cyborg_torchrl.cores.attention_layer import AttentionLayer
from cyborg_torchrl.cores.kernels.native import is_native, run

BLOCK = 64
"""Queries of a row that are computed at once."""
PRODUCTS = 2**18
"""Products that are computed at once: few enough to stay in the processor's cache."""


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


class _WindowAttention(torch.autograd.Function):
    """Attention of a sequence. Arguments and results are those of `attention.attend`."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, age: Tensor) -> Tensor:
        read = torch.empty_like(q)
        kept: list[Tensor] = []
        for queries, steps, distance in _blocks(q, bias):
            is_far = (distance < 0) | (distance >= bias.shape[-1])
            table = bias[:, distance.clamp(0, bias.shape[-1] - 1)].masked_fill(is_far, -torch.inf)
            for rows in _rows(q, table):
                is_before_start = (distance >= age[rows, queries].unsqueeze(-1)).unsqueeze(1)
                products = table.masked_fill(is_before_start, -torch.inf).flatten(0, 1)
                k, v = keys[rows, ..., steps].flatten(0, 1), values[rows, :, steps].flatten(0, 1)
                products.baddbmm_(q[rows, :, queries].flatten(0, 1), k, alpha=q.shape[-1] ** -0.5)
                weights = products.softmax(-1)
                read[rows, :, queries] = torch.bmm(weights, v).view_as(read[rows, :, queries])
                kept.append(weights)
        ctx.save_for_backward(q, keys, values, bias, *kept)
        return read

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)  # it may be called under autocast  # pyright: ignore[reportUntypedFunctionDecorator]
    def backward(ctx: FunctionCtx, grad_read: Tensor) -> tuple[Tensor | None, ...]:
        q, keys, values, bias, *kept = ctx.saved_tensors
        grad_q, grad_bias = torch.empty_like(q), torch.zeros_like(bias)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        all_weights = iter(kept)
        for queries, steps, distance in _blocks(q, bias):
            total: Tensor | None = None
            for rows in _rows(q, distance.expand(bias.shape[0], *distance.shape)):
                weights, grad = next(all_weights), grad_read[rows, :, queries].flatten(0, 1)
                k, v = keys[rows, ..., steps].flatten(0, 1), values[rows, :, steps].flatten(0, 1)
                grad_values[rows, :, steps] += torch.bmm(weights.transpose(1, 2), grad).unflatten(0, (-1, q.shape[1]))
                slope = torch.ops.aten._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), weights, -1, q.dtype)
                by_head = slope.unflatten(0, (-1, q.shape[1])).sum(0)
                total = by_head if total is None else total + by_head
                slope *= q.shape[-1] ** -0.5
                grad_q[rows, :, queries] = torch.bmm(slope, k.transpose(1, 2)).unflatten(0, (-1, q.shape[1]))
                own_q = q[rows, :, queries].flatten(0, 1)
                grad_keys[rows, ..., steps] += torch.bmm(own_q.transpose(1, 2), slope).unflatten(0, (-1, q.shape[1]))
            assert total is not None
            grad_bias.index_add_(1, distance.clamp(0, bias.shape[-1] - 1).flatten(), total.flatten(1))
        return grad_q, grad_keys, grad_values, grad_bias, None


def attend_sequence(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, age: Tensor) -> Tensor:
    """Do the same as `attention.attend`."""
    return _WindowAttention.apply(q, keys, values, bias, age)


def _blocks(q: Tensor, bias: Tensor) -> list[tuple[slice, slice, Tensor]]:
    """Return for each block its queries, its keys, and their distances [queries, keys]."""
    length, window = q.shape[2], bias.shape[-1] - 1
    found = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        index = torch.arange(end - start + window)
        distance = window + index[: end - start].unsqueeze(1) - index
        found.append((slice(start, end), slice(start, end + window), distance))
    return found


def _rows(q: Tensor, table: Tensor) -> list[slice]:
    """Return the rows whose products with a table of this size are computed at once."""
    count = max(1, PRODUCTS // table.numel())
    return [slice(start, start + count) for start in range(0, q.shape[0], count)]
