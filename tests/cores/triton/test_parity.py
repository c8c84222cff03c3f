"""Kernels compared with the torch paths: in Triton's interpreter, or on a GPU if there is one.

The interpreter runs if TRITON_INTERPRET is set before the kernels are loaded. So `test_interpreted.py` runs this file
in a separate process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
pytestmark = (
    []
    if IS_INTERPRETED
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA; test_interpreted.py runs it without"),
    ]
)
OUTPUTS, GRADIENTS = (1e-6, 1e-5) if IS_INTERPRETED else (1e-5, 1e-4)  # a GPU's exponential is an approximation


@pytest.fixture(autouse=True)
def _prepared() -> None:
    torch.manual_seed(0)
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device("cpu")


def leaves(*shapes: tuple[int, ...], scale: float = 1.0) -> list[Tensor]:
    return [(scale * torch.randn(*shape)).requires_grad_() for shape in shapes]


def resets(steps: int, rows: int) -> Tensor:
    """About a third of the flags, and one at the first step if there are several rows."""
    is_init = torch.rand(steps, rows) < 0.3
    is_init[0] = torch.arange(rows) % 2 == 1
    return is_init


def listed(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def assert_same(kernel, reference, floats: list[Tensor]) -> None:
    """Outputs with and without a gradient, and all gradients, equal those of the reference."""
    results = []
    for run in (kernel, reference):
        outputs = listed(run())
        with torch.no_grad():
            assert all(torch.equal(x, y) for x, y in zip(outputs, listed(run()), strict=True))
        weights = [torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape).sin() for x in outputs]
        loss = sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))
        results.append((outputs, torch.autograd.grad(loss, floats)))
    for close, ours, expected in zip((OUTPUTS, GRADIENTS), *results, strict=True):
        for x, y in zip(ours, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=close * max(1.0, float(y.detach().abs().max())))


def gated_floats(steps: int, rows: int, size: int) -> list[Tensor]:
    inputs, *states = leaves((steps, rows, 3 * size), (rows, size), (rows, size))
    # time constants from one step to far more than 1 / eps steps
    return [inputs, torch.logspace(-9, 0, size).requires_grad_(), *states]


def linear_floats(steps: int, rows: int, size: int) -> list[Tensor]:
    return [torch.rand(steps, rows, size).requires_grad_(), *leaves((steps, rows, size), (rows, size), (rows, size))]


def gru_floats(steps: int, rows: int, size: int) -> list[Tensor]:
    shapes = [(steps, rows, 3 * size), (3 * size, size), (3 * size,), (rows, size), (rows, size)]
    return leaves(*shapes, scale=size**-0.25)


def lstm_floats(steps: int, rows: int, size: int) -> list[Tensor]:
    return leaves((steps, rows, 4 * size), (4 * size, size), *[(rows, size)] * 4, scale=size**-0.25)


def selective_floats(steps: int, rows: int, size: int) -> list[Tensor]:
    numbers = 3 if size < 20 else 16
    u, delta, a, b, c, h_0, initial = leaves(
        *[(steps, rows, size)] * 2, (size, numbers), *[(steps, rows, numbers)] * 2, *[(rows, size, numbers)] * 2
    )
    return [u, _leaf(torch.exp(delta - 2)), _leaf(-torch.exp(a)), b, c, h_0, initial]


def ssd_floats(steps: int, rows: int, heads: int) -> list[Tensor]:
    width, numbers = 5, 4
    u, delta, a, b, c, h_0, initial = leaves(
        (steps, rows, heads, width), (steps, rows, heads), (heads,), *[(steps, rows, numbers)] * 2,
        *[(rows, heads, width, numbers)] * 2,
    )  # fmt: skip
    return [u, _leaf(torch.exp(delta - 2)), _leaf(-torch.exp(a)), b, c, h_0, initial]


def conv_floats(steps: int, rows: int, size: int) -> list[Tensor]:
    return leaves((steps, rows, size), (size, 4), (size,), (rows, size, 4), (rows, size, 4))


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


class Recurrence(NamedTuple):
    """A kernel and its reference. Both take floats, of which the last are stored states, is_init and initial states."""

    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    floats: Callable[[int, int, int], list[Tensor]]
    sizes: list[tuple[int, int, int]]
    """Steps, rows and sizes: a single step, and parts of unrolled loops, blocks and tiles."""
    returns_state: bool = False
    states: int = 1

    def run(self, scan: Callable[..., Any], floats: Sequence[Tensor], is_init: Tensor) -> list[Tensor]:
        return listed(scan(*floats[: -self.states], is_init, *floats[-self.states :]))


RECURRENCES = {
    "gated_recurrence": Recurrence(
        lru_kernel.gated_recurrence_triton, lru.gated_recurrence, gated_floats, [(1, 2, 33), (9, 2, 40), (8, 1, 16)]
    ),
    "linear_scan": Recurrence(
        linear_scan.linear_scan_triton, gated_linear_scan, linear_floats, [(1, 2, 33), (9, 2, 40), (8, 1, 16)]
    ),
    "gru": Recurrence(gru_kernel.gru_triton, gru.gru_recurrence, gru_floats, [(1, 2, 16), (6, 5, 33)]),
    "lstm": Recurrence(lstm_kernel.lstm_triton, lstm.lstm_recurrence, lstm_floats, [(1, 2, 16), (6, 5, 33)], states=2),
    "selective_scan": Recurrence(
        scan_kernel.selective_scan_triton, selective_scan, selective_floats, [(1, 2, 5), (18, 1, 33)], True
    ),
    "ssd_scan": Recurrence(scan_kernel.ssd_scan_triton, ssd_scan, ssd_floats, [(1, 2, 3), (18, 1, 2)], True),
    "causal_conv": Recurrence(
        conv_kernel.causal_conv_triton, causal_conv.causal_conv, conv_floats, [(1, 2, 5), (34, 1, 5)], True
    ),
}
MEMORY = {"whole": 4, "parts": 3, "wide": 0}


@pytest.fixture(params=MEMORY)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with as much shared memory as the weights of some gates need: of all, of three, or of none."""

    def memory(weight: Tensor) -> int:
        return 4 * MEMORY[request.param] * resident.padded(weight.shape[1]) ** 2 + resident.MARGIN

    monkeypatch.setattr(resident, "shared_memory", memory)
    return request.param


def paths(name: str) -> list[str]:
    return {"gru": ["parts", "wide"], "lstm": list(MEMORY)}.get(name, ["whole"])


PATHS = [(name, path) for name in RECURRENCES for path in paths(name)]
CASES = [(name, path, sizes) for name, path in PATHS for sizes in RECURRENCES[name].sizes]


@pytest.mark.parametrize(("name", "path", "sizes"), CASES, indirect=["path"], ids=str)
def test_a_kernel_equals_the_torch_path(name: str, path: str, sizes: tuple[int, int, int]) -> None:
    case = RECURRENCES[name]
    floats, is_init = case.floats(*sizes), resets(*sizes[:2])
    assert_same(
        lambda: case.run(case.kernel, floats, is_init), lambda: case.run(case.reference, floats, is_init), floats
    )


@pytest.mark.parametrize(("name", "path"), PATHS, indirect=["path"])
@torch.no_grad()
def test_a_sequence_equals_its_steps_bit_by_bit(name: str, path: str) -> None:
    case, steps, rows = RECURRENCES[name], 5, 2
    floats, is_init = case.floats(steps, rows, 18), resets(steps, rows)
    whole = case.run(case.kernel, floats, is_init)
    k = case.states
    *inputs, initial = [*floats[: -2 * k], floats[-k:]]
    state = floats[-2 * k : -k]
    for t in range(steps):
        of_step = [x[t : t + 1] if x.ndim > 2 and x.shape[:2] == (steps, rows) else x for x in inputs]
        outputs = case.run(case.kernel, [*of_step, *state, *initial], is_init[t : t + 1])
        assert torch.equal(outputs[0][0], whole[0][t]), t
        state = [outputs[1]] if case.returns_state else [output[0] for output in outputs]
    if case.returns_state:
        assert torch.equal(state[0], whole[1])


@pytest.mark.parametrize(("name", "path"), PATHS, indirect=["path"])
def test_a_row_does_not_depend_on_its_batch(name: str, path: str) -> None:
    """Rows of gradients, too. A wide layer uses the products of the vendor's library, which chooses by the size."""
    case, steps, rows = RECURRENCES[name], 3, 3
    floats, is_init = case.floats(steps, rows, 18), resets(steps, rows)
    batch = [x.ndim > 1 and x.shape[:2] == (steps, rows) for x in floats]
    state = [x.shape[0] == rows for x in floats]
    one = [_leaf(x[:, 1:2] if by else x[1:2] if of else x) for x, by, of in zip(floats, batch, state, strict=True)]
    whole, alone = case.run(case.kernel, floats, is_init), case.run(case.kernel, one, is_init[:, 1:2])
    exact = path != "wide"
    is_close = torch.equal if exact else lambda x, y: torch.allclose(x, y, rtol=0, atol=1e-5)
    assert is_close(whole[0][:, 1:2], alone[0])
    grads = [torch.autograd.grad(sum(x.square().sum() for x in out), xs) for out, xs in ((whole, floats), (alone, one))]
    for both, single, by, of in zip(*grads, batch, state, strict=True):
        if by or of:
            assert is_close(both[:, 1:2] if by else both[1:2], single)


@pytest.mark.parametrize(("name", "path"), PATHS, indirect=["path"])
def test_nothing_of_an_ended_episode_is_used(name: str, path: str) -> None:
    case, steps, rows = RECURRENCES[name], 5, 2
    floats, is_init = case.floats(steps, rows, 18), torch.zeros(steps, rows, dtype=torch.bool)
    is_init[0] = True
    stored = floats[-2 * case.states : -case.states]
    with torch.no_grad():
        for state in stored:
            state.fill_(float("nan"))
    outputs = case.run(case.kernel, floats, is_init)
    grads = torch.autograd.grad(sum(x.sum() for x in outputs), floats)
    assert all(bool(x.isfinite().all()) for x in (*outputs, *grads))
    assert not any(bool(grad.any()) for grad in grads[-2 * case.states : -case.states])


def test_a_convolution_without_a_bias() -> None:
    x, weight, _, history, initial = conv_floats(3, 2, 5)
    arguments = (x, weight, None, history, resets(3, 2), initial)
    assert_same(
        lambda: conv_kernel.causal_conv_triton(*arguments),
        lambda: causal_conv.causal_conv(*arguments),
        [x, weight, history, initial],
    )


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


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("rows", [(3, 5), (700, 1)])
def test_the_gated_readout(rows: tuple[int, int], has_norm: bool) -> None:
    norm = timescale.TimescaleNorm(24, 4, 1e-4, torch.rand(24) + 0.5) if has_norm else None
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
