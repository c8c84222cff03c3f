"""Linear maps by the faster of torch's two libraries.

On a CPU torch multiplies float32 matrices with MKL, which takes its slower paths on processors that are not Intel's:
there oneDNN, which torch ships too, was measured 1.5 times as fast for a step of 64 environments (128 features to 384),
and 2.0 to 2.5 times over the rows of a sequence.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from cyborg_torchrl.cores.kernels.native import function, is_native

MIN_WORK = 2**20
"""Multiplications from which oneDNN's own overhead (about 10 us) is made up for."""

MIN_WIDTH = 32
"""Rows and columns of a weight from which our own sum of its gradient fills the processor's vectors."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`, with oneDNN where that is faster.

    Args:
        x: [*B, F].
        weight: [D, F].
        bias: [D].
    """
    is_large = not torch.compiler.is_exporting() and x.numel() * weight.shape[0] >= MIN_WORK
    if is_large and x.dtype is torch.float32 and _takes_onednn(x):
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return _Linear.apply(x, weight, bias)
        return _multiply(x, weight, bias)
    return F.linear(x, weight, bias)


def weight_gradient(grads: Tensor, rows: Tensor) -> Tensor:
    """The gradient of a linear map's weight, summed over rows: grads^T rows.

    Args:
        grads: of what the map returned, [R, D].
        rows: what it was given, [R, F].

    Returns:
        [D, F]; differentiable itself only where gradients are enabled.
    """
    is_wide = min(grads.shape[1], rows.shape[1]) >= MIN_WIDTH
    if is_wide and is_native(rows) and grads.dtype is rows.dtype and not torch.is_grad_enabled():
        return _weight_gradient(grads, rows)
    return linear(grads.t(), rows.t())


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """From [*B, in_features] to [*B, out_features]."""
        return linear(input, self.weight, self.bias)


class _Scope(threading.local):
    """Which scope of fixed parameters this thread is in; 0: none."""

    number = 0


_scope, _numbers = _Scope(), itertools.count(1)


@contextmanager
def fixed_parameters() -> Generator[None]:
    """A scope in which no parameter changes: what derives from them (`Derived`) is computed once.

    That they have not changed cannot be seen from them: fused optimisers and writes to `.data` leave no trace.
    """
    before, _scope.number = _scope.number, next(_numbers)
    try:
        yield
    finally:
        _scope.number = before


class Derived:
    """What is computed from parameters alone: once in a scope of `fixed_parameters`, and each time elsewhere.

    Args:
        function: from parameters to tensors; at the top level of a module, so that it can be pickled.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self.function = function
        self._forget()

    def of(self, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        """What the function makes of them."""
        scope = 0 if torch.is_grad_enabled() or torch.compiler.is_compiling() else _scope.number
        if not scope:
            return self.function(*parameters)
        is_same = scope == self._scope and len(parameters) == len(self._parameters)
        if not (is_same and all(map(is_, parameters, self._parameters))):
            self._parameters, self._scope = parameters, scope
            self._derived = self.function(*parameters)
        return self._derived

    def __getstate__(self) -> Callable[..., tuple[Tensor, ...]]:
        """Copies begin anew."""
        return self.function

    def __setstate__(self, state: Callable[..., tuple[Tensor, ...]]) -> None:
        """Begins anew."""
        self.function = state
        self._forget()

    def _forget(self) -> None:
        self._parameters: tuple[Tensor | None, ...] = ()
        self._scope = 0
        self._derived: tuple[Tensor, ...] = ()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, grads = x.flatten(0, -2), grad_y.flatten(0, -2)
        # a gradient of this gradient is torch's own
        product = torch.nn.functional.linear if torch.is_grad_enabled() else _multiply
        grad_x = product(grad_y, weight.t()) if needs_x else None
        grad_weight = weight_gradient(grads, rows) if needs_weight else None
        return grad_x, grad_weight, grads.sum(0) if ctx.has_bias and needs_bias else None


@torch.library.custom_op(
    "cyborg_torchrl::weight_gradient",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grads, Tensor rows) -> Tensor",
)
def _weight_gradient(grads: Tensor, rows: Tensor) -> Tensor:
    grads, rows = grads.contiguous(), rows.contiguous()
    total = rows.new_zeros(grads.shape[1], rows.shape[1])
    function("grad_weight", rows.dtype)(
        *grads.shape, rows.shape[1], torch.get_num_threads(), grads.data_ptr(), rows.data_ptr(), total.data_ptr()
    )
    return total


@_weight_gradient.register_fake
def _(grads: Tensor, rows: Tensor) -> Tensor:
    return rows.new_empty(grads.shape[1], rows.shape[1])


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _takes_onednn(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and _is_faster_here()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()  # which know no rule for it
    )


@cache
def _is_faster_here() -> bool:
    """Whether MKL takes its slower paths on this processor."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "AuthenticAMD" in processor
