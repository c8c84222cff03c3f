"""Kernels in Triton's interpreter, compared with the torch paths. `test_interpreted.py` runs this file.

The interpreter runs if TRITON_INTERPRET is set before the kernels are loaded. So these tests need a separate process.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cyborg_torchrl.cores import (
    causal_conv,
    gated_linear_scan,
    gated_readout,
    gru,
    lru,
    lstm,
    scan,
    selective_scan,
    ssd_scan,
    timescale,
)
from cyborg_torchrl.cores.kernels import choice, official_mamba
from cyborg_torchrl.cores.kernels.triton import causal_conv as conv_kernel
from cyborg_torchrl.cores.kernels.triton import gated_readout as readout_kernel
from cyborg_torchrl.cores.kernels.triton import gated_recurrence as lru_kernel
from cyborg_torchrl.cores.kernels.triton import group_norm, launch, linear_scan, resident
from cyborg_torchrl.cores.kernels.triton import gru as gru_kernel
from cyborg_torchrl.cores.kernels.triton import lstm as lstm_kernel
from cyborg_torchrl.cores.kernels.triton import selective_scan as scan_kernel
from cyborg_torchrl.objectives import functional
from cyborg_torchrl.objectives.functional import generalized_advantage
from cyborg_torchrl.registry import backbones

assert os.environ.get("TRITON_INTERPRET") == "1", "run tests/cores/triton/test_interpreted.py"

OUTPUTS, GRADIENTS = 1e-6, 1e-5
SIZES = pytest.mark.parametrize(
    ("steps", "rows", "size"), [(1, 2, 33), (11, 2, 40), (8, 1, 16)], ids=lambda size: str(size)
)
"""Single steps; parts of unrolled loops and of blocks; whole ones."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def leaves(*shapes: tuple[int, ...], scale: float = 1.0) -> list[Tensor]:
    return [(scale * torch.randn(*shape)).requires_grad_() for shape in shapes]


def resets(steps: int, rows: int) -> Tensor:
    """About a third of the flags, and one at the first step if there are several rows."""
    is_init = torch.rand(steps, rows) < 0.3
    is_init[0] = torch.arange(rows) % 2 == 1
    return is_init


def assert_same(kernel, reference, floats: list[Tensor]) -> None:
    """Outputs with and without a gradient, and all gradients, equal those of the reference."""
    results = []
    for run in (kernel, reference):
        outputs = run()
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        with torch.no_grad():
            again = run()
        again = [again] if isinstance(again, Tensor) else list(again)
        assert all(torch.equal(x, y) for x, y in zip(outputs, again, strict=True))
        weights = [torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape).sin() for x in outputs]
        loss = sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))
        results.append((outputs, torch.autograd.grad(loss, floats)))
    for close, ours, expected in zip((OUTPUTS, GRADIENTS), *results, strict=True):
        for x, y in zip(ours, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=close * max(1.0, float(y.detach().abs().max())))


@SIZES
def test_the_gated_recurrence(steps: int, rows: int, size: int) -> None:
    inputs, h_0, initial = leaves((steps, rows, 3 * size), (rows, size), (rows, size))
    # time constants from one step to far more than 1 / eps steps
    rate = torch.logspace(-9, 0, size).requires_grad_()
    is_init = resets(steps, rows)
    arguments = (inputs, rate, h_0, is_init, initial)
    assert_same(
        lambda: lru_kernel.gated_recurrence_triton(*arguments),
        lambda: lru.gated_recurrence(*arguments),
        [inputs, rate, h_0, initial],
    )


@SIZES
def test_the_linear_scan(steps: int, rows: int, size: int) -> None:
    drive, h_0, initial = leaves((steps, rows, size), (rows, size), (rows, size))
    decay = torch.rand(steps, rows, size).requires_grad_()
    arguments = (decay, drive, h_0, resets(steps, rows), initial)
    assert_same(
        lambda: linear_scan.linear_scan_triton(*arguments),
        lambda: gated_linear_scan(*arguments),
        [decay, drive, h_0, initial],
    )


@pytest.mark.parametrize("kernel", ["gated_recurrence", "linear_scan"])
def test_a_sequence_equals_its_steps_bit_by_bit(kernel: str) -> None:
    steps, rows, size = 9, 1, 35
    is_init, (h_0, initial) = resets(steps, rows), torch.randn(2, rows, size)
    if kernel == "gated_recurrence":
        inputs, rate = torch.randn(steps, rows, 3 * size), torch.rand(size)

        def run(span: slice, state: Tensor) -> Tensor:
            return lru_kernel.gated_recurrence_triton(inputs[span], rate, state, is_init[span], initial)
    else:
        decay, drive = torch.rand(2, steps, rows, size)

        def run(span: slice, state: Tensor) -> Tensor:
            return linear_scan.linear_scan_triton(decay[span], drive[span], state, is_init[span], initial)

    whole, state = run(slice(0, steps), h_0), h_0
    for t in range(steps):
        state = run(slice(t, t + 1), state)[0]
        assert torch.equal(state, whole[t]), t


def test_nothing_of_an_ended_episode_is_used() -> None:
    steps, rows, size = 5, 2, 16
    is_init = torch.zeros(steps, rows, dtype=torch.bool)
    is_init[0] = True
    (h_0,) = leaves((rows, size))
    with torch.no_grad():
        h_0.fill_(float("nan"))
    inputs, initial = leaves((steps, rows, 3 * size), (rows, size))
    rate = torch.rand(size).requires_grad_()
    decay, drive = leaves((steps, rows, size), (steps, rows, size))
    for states, floats in (
        (lru_kernel.gated_recurrence_triton(inputs, rate, h_0, is_init, initial), [inputs, rate, h_0, initial]),
        (linear_scan.linear_scan_triton(decay, drive, h_0, is_init, initial), [decay, drive, h_0, initial]),
    ):
        grads = torch.autograd.grad(states.sum(), floats)
        assert all(bool(x.isfinite().all()) for x in (states, *grads))
        assert not grads[2].any()


@pytest.mark.parametrize(("rows", "steps"), [(3, 21), (33, 8), (1, 1)])
def test_generalized_advantages(rows: int, steps: int) -> None:
    reward, value, following = torch.randn(3, rows, steps)
    terminated = torch.rand(rows, steps) < 0.1
    done = terminated | (torch.rand(rows, steps) < 0.1)
    arguments = (reward, value, following, terminated, done, 0.99, 0.95)
    expected, _ = generalized_advantage(*arguments)
    advantage = linear_scan.generalized_advantage_triton(*arguments)
    torch.testing.assert_close(advantage, expected, rtol=0, atol=OUTPUTS * float(expected.abs().max().clamp_min(1)))


@pytest.mark.parametrize("has_scales", [False, True])
@pytest.mark.parametrize(("shape", "groups"), [((3, 5, 24), 4), ((7, 7), 16), ((40, 96), 16), ((3, 10), 1)])
def test_the_group_norm(shape: tuple[int, ...], groups: int, has_scales: bool) -> None:
    scales = torch.rand(shape[-1]) + 0.5 if has_scales else None
    norm = timescale.TimescaleNorm(shape[-1], groups, 1e-4, scales)
    (x,) = leaves(shape)
    with torch.no_grad():
        x.view(-1, shape[-1])[1] = 0.0  # exact zeros stay zero and get no gradient

    def reference() -> Tensor:
        scaled = (x if scales is None else x * scales).unflatten(-1, (norm.groups, -1))
        mean = scaled.square().mean(-1, keepdim=True)
        return (scaled * torch.rsqrt(mean + 1e-4)).masked_fill(mean == 0, 0.0).flatten(-2)

    def kernel() -> Tensor:
        return group_norm.group_norm_triton(x, scales, norm.groups, 1e-4)

    assert_same(kernel, reference, [x])
    (grad,) = torch.autograd.grad(kernel().sum(), x)
    assert not grad.view(-1, shape[-1])[1].any()


MEMORY = {"whole": 4, "parts": 3, "wide": 0}


@pytest.fixture(params=MEMORY)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with as much shared memory as the weights of some gates need: of all, of three, or of none."""

    def memory(weight: Tensor) -> int:
        return 4 * MEMORY[request.param] * resident.padded(weight.shape[1]) ** 2 + resident.MARGIN

    monkeypatch.setattr(resident, "shared_memory", memory)
    return request.param


MATRICES = pytest.mark.parametrize(("steps", "rows", "size"), [(1, 2, 16), (6, 5, 33)])
"""One step, and sizes that fill no tile."""


@MATRICES
def test_the_lstm(path: str, steps: int, rows: int, size: int) -> None:
    floats = leaves((steps, rows, 4 * size), (4 * size, size), *[(rows, size)] * 4, scale=size**-0.25)
    arguments = (*floats[:4], resets(steps, rows), *floats[4:])
    assert_same(lambda: lstm_kernel.lstm_triton(*arguments), lambda: lstm.lstm_recurrence(*arguments), floats)


@MATRICES
@pytest.mark.parametrize("path", ["parts", "wide"], indirect=True)
def test_the_gru(path: str, steps: int, rows: int, size: int) -> None:
    shapes = [(steps, rows, 3 * size), (3 * size, size), (3 * size,), (rows, size), (rows, size)]
    floats = leaves(*shapes, scale=size**-0.25)
    arguments = (*floats[:4], resets(steps, rows), floats[4])
    assert_same(lambda: gru_kernel.gru_triton(*arguments), lambda: gru.gru_recurrence(*arguments), floats)


def selective_case(steps: int, rows: int, channels: int, numbers: int) -> tuple[list[Tensor], Tensor]:
    u, delta, a, b, c, h_0, initial = (
        torch.randn(*shape)
        for shape in [
            *[(steps, rows, channels)] * 2,
            (channels, numbers),
            *[(steps, rows, numbers)] * 2,
            *[(rows, channels, numbers)] * 2,
        ]
    )
    floats = [u, torch.exp(delta - 2), -torch.exp(a), b, c, h_0, initial]
    return [x.requires_grad_() for x in floats], resets(steps, rows)


def shared_case(steps: int, rows: int, heads: int, width: int, numbers: int) -> tuple[list[Tensor], Tensor]:
    u, h_0, initial = (torch.randn(*s) for s in [(steps, rows, heads, width), *[(rows, heads, width, numbers)] * 2])
    floats = [u, torch.exp(torch.randn(steps, rows, heads) - 2), -torch.exp(torch.randn(heads))]
    floats += [*torch.randn(2, steps, rows, numbers).unbind(0), h_0, initial]
    return [x.detach().requires_grad_() for x in floats], resets(steps, rows)


@pytest.mark.parametrize("sizes", [(1, 2, 5, 3), (19, 1, 33, 16)])
def test_the_selective_scan(sizes: tuple[int, ...]) -> None:
    floats, is_init = selective_case(*sizes)
    arguments = (*floats[:6], is_init, floats[6])
    assert_same(lambda: scan_kernel.selective_scan_triton(*arguments), lambda: selective_scan(*arguments), floats)


@pytest.mark.parametrize("sizes", [(1, 2, 3, 5, 4), (18, 1, 2, 8, 16)])
def test_the_scan_of_heads(sizes: tuple[int, ...]) -> None:
    floats, is_init = shared_case(*sizes)
    arguments = (*floats[:6], is_init, floats[6])
    assert_same(lambda: scan_kernel.ssd_scan_triton(*arguments), lambda: ssd_scan(*arguments), floats)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("steps", "rows", "share"), [(1, 2, 0.5), (2, 2, 0.0), (34, 1, 0.2)])
def test_the_causal_convolution(steps: int, rows: int, share: float, has_bias: bool) -> None:
    size = 5
    floats = leaves((steps, rows, size), (size, 4), (rows, size, 4), (rows, size, 4))
    x, weight, history, initial = floats
    (bias,) = leaves((size,)) if has_bias else (None,)
    arguments = (x, weight, bias, history, torch.rand(steps, rows) < share, initial)
    assert_same(
        lambda: conv_kernel.causal_conv_triton(*arguments),
        lambda: causal_conv.causal_conv(*arguments),
        [*floats, bias] if has_bias else floats,
    )


@pytest.mark.parametrize("norm", [None, timescale.TimescaleNorm(24, 4, 1e-4, torch.rand(24) + 0.5)])
@pytest.mark.parametrize("rows", [(3, 5), (700, 1)])
def test_the_gated_readout(rows: tuple[int, int], norm: timescale.TimescaleNorm | None) -> None:
    floats = leaves(*[(*rows, 24)] * 3, (24,))
    options = (None, 0, 0.0) if norm is None else (norm.timescales, norm.groups, norm.eps)

    def reference() -> Tensor:
        y, u, z, skip = floats
        return (skip * u + (y if norm is None else y * norm.factors(y))) * torch.nn.functional.silu(z)

    assert_same(lambda: readout_kernel.gated_readout_triton(*floats, *options), reference, floats)


def test_the_operator_passes_torchs_checks() -> None:
    inputs, rate, states = torch.randn(2, 2, 12), torch.rand(4), torch.randn(2, 2, 4)
    is_init, outputs = torch.rand(2, 2) < 0.3, [torch.empty(2, 2, 4)]
    arguments = ("gated_recurrence", [inputs, rate, *states, is_init], outputs, [])
    torch.library.opcheck(launch._operator, arguments)


SWITCHES = [(choice, "is_native"), (choice, "is_triton"), (scan, "is_triton"), (timescale, "is_native")]
SWITCHES += [(timescale, "is_triton"), (functional, "is_triton"), (gated_readout, "is_triton")]
SWITCHES += [(causal_conv, "is_triton")]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Turns the kernels on, or the torch paths, for tensors on a CPU."""

    def turn(is_on: bool) -> None:
        path = "triton" if is_on else "torch"
        monkeypatch.setattr(official_mamba.Kernel, "choose", lambda *_: path)
        for module, name in SWITCHES:
            monkeypatch.setattr(module, name, lambda _, answer=is_on and name == "is_triton": answer)

    return turn


@pytest.mark.parametrize("name", ["lru", "gru", "lstm", "min_gru", "pseudo_mamba", "mamba", "mamba2"])
def test_a_core_uses_the_kernels_for_steps_and_sequences(
    use: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(resident, "shared_memory", lambda _: 2**20)
    core = backbones.get(name)(5, hidden_size=16, max_horizon=20)
    x, is_init = torch.randn(2, 4, 5), resets(2, 4)
    results = []
    for is_on in (True, False):
        use(is_on)
        with torch.no_grad():
            y, state = core(x, core.initial_state(2), is_init)
            y_1, state_1 = core.step(x[:, 0], core.initial_state(2))
        results.append([y, *state.values(), y_1, *state_1.values()])
        if is_on:
            torch.testing.assert_close(y_1, y[:, 0], rtol=0, atol=OUTPUTS)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)  # the norm amplifies rounding


def test_advantages_of_a_gpu_use_the_kernel(use: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    use(True)
    monkeypatch.setattr(functional, "generalized_advantage_triton", lambda *arguments: arguments[0] + 7.0)
    reward, value, following, ended = torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2) > 0
    advantage, target = generalized_advantage(reward, value, following, ended, ended, 0.9, 0.9)
    assert advantage.unique().item() == 7.0
    assert target.unique().item() == 8.0
    _, target = generalized_advantage(reward, value.requires_grad_(), following, ended, ended, 0.9, 0.9)
    assert target.requires_grad  # with a gradient, torch's operations are used
