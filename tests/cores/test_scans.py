"""All scans with resets and stored states, compared with numerical gradients and with a plain loop."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from cyborg_torchrl.cores import (
    blocks,
    gated_linear_scan,
    gru,
    lru,
    lstm,
    selective_scan,
    ssd_scan,
    timescale,
)
from cyborg_torchrl.cores.causal_conv import causal_conv, causal_conv_step
from cyborg_torchrl.cores.kernels import gated_recurrence as gated_recurrence_cpp
from cyborg_torchrl.cores.kernels import gru as gru_cpp
from cyborg_torchrl.cores.kernels import lstm as lstm_cpp
from cyborg_torchrl.cores.kernels import native
from cyborg_torchrl.cores.kernels import selective_scan as selective_scan_cpp

T, B, D, N = 7, 3, 2, 2
SHARES = pytest.mark.parametrize("share", [0.0, 0.3, 0.8])


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def positive(*shape: int) -> Tensor:
    return torch.exp(torch.randn(*shape, dtype=torch.float64) - 1).requires_grad_()


def linear_case() -> tuple:
    decay = torch.rand(T, B, D, dtype=torch.float64, requires_grad=True)
    return gated_linear_scan, [decay, double(T, B, D), double(B, D)], double(B, D)


def selective_case() -> tuple:
    a = (-positive(D, N).detach()).requires_grad_()
    return (
        selective_scan,
        [double(T, B, D), positive(T, B, D), a, double(T, B, N), double(T, B, N), double(B, D, N)],
        double(B, D, N),
    )


def selective_cpp_case() -> tuple:
    if native.library() is None:
        pytest.skip("the C++ scan is not built here")
    _, arguments, initial = selective_case()
    return selective_scan_cpp.selective_scan_cpp, arguments, initial


def gated_case(scan=lru.gated_recurrence) -> tuple:
    return scan, [double(T, B, 3 * D), positive(D), double(B, D)], double(B, D)


def gated_cpp_case() -> tuple:
    if native.library() is None:
        pytest.skip("nothing is built in C++ here")
    return gated_case(gated_recurrence_cpp.gated_recurrence_cpp)


def lstm_case(scan=lstm.lstm_recurrence) -> tuple:
    floats = [double(T, B, 4 * D), double(4 * D, D), double(B, D), double(B, D), double(B, D)]

    def states(*arguments: Tensor) -> tuple[Tensor, Tensor]:  # the last argument is the one initial state
        *first, initial_h_and_c, is_init, initial_h = arguments
        return scan(*first, is_init, initial_h, initial_h_and_c)

    return states, floats, double(B, D)


def lstm_cpp_case() -> tuple:
    if native.library() is None:
        pytest.skip("nothing is built in C++ here")
    return lstm_case(lstm_cpp.lstm_cpp)


def gru_case(scan=gru.gru_recurrence) -> tuple:
    return scan, [double(T, B, 3 * D), double(3 * D, D), double(3 * D), double(B, D)], double(B, D)


def gru_cpp_case() -> tuple:
    if native.library() is None:
        pytest.skip("nothing is built in C++ here")
    return gru_case(gru_cpp.gru_cpp)


def ssd_case() -> tuple:
    a = (-positive(D).detach()).requires_grad_()
    arguments = [double(T, B, D, 3), positive(T, B, D), a, double(T, B, N), double(T, B, N), double(B, D, 3, N)]
    return (lambda *a: ssd_scan(*a, chunk=3)), arguments, double(B, D, 3, N)


def conv_case() -> tuple:
    return causal_conv, [double(T, B, D), double(D, 4), double(D), double(B, D, 4)], double(B, D, 4)


CASES = pytest.mark.parametrize(
    "case",
    [
        linear_case,
        gated_case,
        gated_cpp_case,
        gru_case,
        gru_cpp_case,
        lstm_case,
        lstm_cpp_case,
        selective_case,
        selective_cpp_case,
        ssd_case,
        conv_case,
    ],
)


@CASES
@SHARES
def test_gradients_are_right(case, share: float) -> None:
    scan, arguments, initial = case()
    is_init = torch.rand(T, B) < share
    assert torch.autograd.gradcheck(lambda *floats: scan(*floats[:-1], is_init, floats[-1]), (*arguments, initial))


@SHARES
@pytest.mark.parametrize("case", [selective_case, selective_cpp_case])
def test_the_selective_scan_is_a_loop(case, share: float) -> None:
    scan, (u, delta, a, b, c, h_0), initial = case()
    is_init = torch.rand(T, B) < share
    y, last = scan(u, delta, a, b, c, h_0, is_init, initial)
    h_t = h_0
    for t in range(T):
        h_t = torch.where(is_init[t, :, None, None], initial, h_t)
        h_t = torch.exp(delta[t, :, :, None] * a) * h_t + (delta[t] * u[t])[:, :, None] * b[t, :, None]
        torch.testing.assert_close(y[t], (h_t * c[t, :, None]).sum(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(last, h_t, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block_numel", [1, 2 * B * D * N, 5 * B * D * N])
@CASES
def test_blocks_of_any_length_compute_the_same(monkeypatch, case, block_numel: int) -> None:
    scan, arguments, initial = case()
    is_init = torch.rand(T, B) < 0.3
    results = []
    for numel in (2**19, block_numel):
        for module in (sys.modules[selective_scan.__module__], blocks):
            monkeypatch.setattr(module, "BLOCK_NUMEL", numel)
        monkeypatch.setattr(selective_scan_cpp, "LENGTH", min(32, numel // (B * D * N) + 1))
        results_of_scan = scan(*arguments, is_init, initial)
        y, last = results_of_scan if isinstance(results_of_scan, tuple) else (results_of_scan, results_of_scan)
        results.append([y, last, *torch.autograd.grad(y.square().sum() + last.sum(), [*arguments, initial])])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@SHARES
@pytest.mark.parametrize("chunk", [1, 3, 7, 16])
def test_the_ssd_scan_is_a_loop(share: float, chunk: int) -> None:
    _, (u, delta, a, b, c, h_0), initial = ssd_case()
    is_init = torch.rand(T, B) < share
    y, last = ssd_scan(u, delta, a, b, c, h_0, is_init, initial, chunk)
    h_t = h_0
    for t in range(T):
        h_t = torch.where(is_init[t, :, None, None, None], initial, h_t)
        drive = (delta[t].unsqueeze(-1) * u[t]).unsqueeze(-1) * b[t, :, None, None]
        h_t = torch.exp(delta[t] * a)[..., None, None] * h_t + drive
        torch.testing.assert_close(y[t], (h_t * c[t, :, None, None]).sum(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(last, h_t, rtol=0, atol=1e-12)


@SHARES
@pytest.mark.parametrize("steps", [1, 2, T])
def test_the_convolution_is_its_steps(share: float, steps: int) -> None:
    _, (x, weight, bias, history), initial = conv_case()
    x, is_init = x[:steps], torch.rand(steps, B) < share
    y, last = causal_conv(x, weight, bias, history, is_init, initial)
    for t in range(steps):
        history = torch.where(is_init[t, :, None, None], initial, history)
        y_t, history = causal_conv_step(x[t], weight, bias, history)
        torch.testing.assert_close(y[t], y_t, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, history, rtol=0, atol=0)


def test_the_convolution_is_torchs_own_where_nothing_restarts() -> None:
    conv = torch.nn.Conv1d(D, D, 4, groups=D, padding=3).double()
    x, zero = double(T, B, D), torch.zeros(B, D, 4, dtype=torch.float64)
    y, _ = causal_conv(x, conv.weight.squeeze(1), conv.bias, zero, torch.zeros(T, B, dtype=torch.bool), zero)
    expected = torch.nn.functional.silu(conv(x.permute(1, 2, 0))[..., :T].permute(2, 0, 1))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scan", [selective_scan, selective_scan_cpp.selective_scan_cpp, ssd_scan, gated_linear_scan])
def test_no_steps_are_refused(scan) -> None:
    name = scan.__name__
    case = {
        "selective_scan": selective_case,
        "selective_scan_cpp": selective_case,
        "ssd_scan": ssd_case,
        "gated_linear_scan": linear_case,
    }[name]
    _, arguments, initial = case()
    arguments = [x[:0] if x.shape[0] == T else x for x in arguments]
    with pytest.raises(ValueError, match="scan needs at least one step"):
        scan(*arguments, torch.zeros(0, B, dtype=torch.bool), initial)


@SHARES
@pytest.mark.parametrize("case", [gated_case, gated_cpp_case])
def test_the_gated_recurrence_is_a_loop(case, share: float) -> None:
    scan, (inputs, rate, h_0), initial = case()
    is_init = torch.rand(T, B) < share
    states = scan(inputs, rate, h_0, is_init, initial)
    decay_gate, input_gate, x = inputs.chunk(3, -1)
    h_t = h_0
    for t in range(T):
        decay = torch.exp(-2.0 * torch.sigmoid(decay_gate[t]) * rate)
        h_t = torch.where(is_init[t, :, None], initial, h_t)
        h_t = decay * h_t + torch.sqrt(1 - decay**2) * torch.sigmoid(input_gate[t]) * x[t]
        torch.testing.assert_close(states[t], h_t, rtol=0, atol=1e-12)


@pytest.mark.parametrize("has_timescales", [False, True])
@pytest.mark.parametrize(("features", "groups"), [(24, 4), (7, 16), (64, 16), (10, 1)])
def test_the_group_norm_equals_its_formula(monkeypatch, features: int, groups: int, has_timescales: bool) -> None:
    timescales = torch.rand(features, dtype=torch.float64) + 0.5 if has_timescales else None
    norm = timescale.TimescaleNorm(features, groups, 1e-4, timescales).double()
    x = double(3, 5, features)
    with torch.no_grad():
        x[1, 2] = 0.0  # exact zeros stay zero and get no gradient
    scaled = (x if timescales is None else x * timescales).unflatten(-1, (norm.groups, -1))
    mean = scaled.square().mean(-1, keepdim=True)
    y = (scaled * torch.rsqrt(mean + 1e-4)).masked_fill(mean == 0, 0.0).flatten(-2)
    weights = torch.randn(x.shape, dtype=torch.float64)
    expected = [y, torch.autograd.grad((y * weights).sum(), x)[0]]
    for is_native in (True, False) if native.library() else (False,):
        monkeypatch.setattr(timescale, "is_native", lambda _, is_native=is_native: is_native)
        y = norm(x)
        with torch.no_grad():
            torch.testing.assert_close(norm(x), y, rtol=1e-13, atol=1e-13)
        close = 1e-12 if is_native else 1e-6  # torch's means are products with float32 shares
        for ours, right in zip((y, torch.autograd.grad((y * weights).sum(), x)[0]), expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=close, atol=close)
            assert not ours[1, 2].any()


def assert_scans_agree(scans, run, floats: list[Tensor], close: float, threads: int) -> None:
    """Assert that results and gradients of `run(scan)` agree between scans, and results without a gradient too."""
    used, results = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for scan in scans:
            outputs = run(scan)
            with torch.no_grad():
                assert all(torch.equal(alone, output) for alone, output in zip(run(scan), outputs, strict=True))
            weights = [torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape).sin() for x in outputs]
            loss = sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))
            results.append([*outputs, *torch.autograd.grad(loss, floats)])
    finally:
        torch.set_num_threads(used)
    for ours, expected in zip(*results, strict=True):
        scale = float(expected.detach().abs().max().clamp_min(1))
        torch.testing.assert_close(ours, expected, rtol=0, atol=close * scale)


BUILT = pytest.mark.skipif(native.library() is None, reason="the C++ scan is not built here")
EDGES = [(1, 1, 1, 1), (65, 2, 16, 16), (33, 5, 35, 16), (40, 3, 7, 33)]
"""[T, B, D, N]: single, whole tiles and chunks, parts of both, and any number of state numbers."""


@BUILT
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-13), (torch.float32, 2e-5)])
@pytest.mark.parametrize("sizes", EDGES)
def test_the_cpp_scan_equals_the_torch_scan(sizes, dtype, close: float, threads: int) -> None:
    steps, batch, channels, numbers = sizes
    shapes = [(steps, batch, channels)] * 2 + [(channels, numbers)] + [(steps, batch, numbers)] * 2
    u, delta, a, b, c, h_0, initial = (
        torch.randn(*shape, dtype=dtype) for shape in [*shapes, *[(batch, channels, numbers)] * 2]
    )
    floats = [x.requires_grad_() for x in (u, torch.exp(delta - 2), -torch.exp(a), b, c, h_0, initial)]
    is_init = torch.rand(steps, batch) < 0.1
    scans = (selective_scan_cpp.selective_scan_cpp, selective_scan)
    assert_scans_agree(scans, lambda scan: scan(*floats[:-1], is_init, floats[-1]), floats, close, threads)


@BUILT
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-13), (torch.float32, 2e-5)])
@pytest.mark.parametrize("sizes", EDGES)
def test_the_cpp_recurrence_equals_torchs(sizes, dtype, close: float, threads: int) -> None:
    steps, batch, channels, _ = sizes
    inputs = torch.randn(steps, batch, 3 * channels, dtype=dtype, requires_grad=True)
    # time constants from one step to far more than 1 / eps steps
    rate = torch.logspace(-9, 0, channels, dtype=dtype).requires_grad_()
    states = [torch.randn(batch, channels, dtype=dtype, requires_grad=True) for _ in range(2)]
    is_init = torch.rand(steps, batch) < 0.1
    scans = (gated_recurrence_cpp.gated_recurrence_cpp, lru.gated_recurrence)
    assert_scans_agree(
        scans,
        lambda scan: [scan(inputs, rate, states[0], is_init, states[1])],
        [inputs, rate, *states],
        close,
        threads,
    )


@BUILT
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (40, 13, 16), (33, 5, 35), (9, 23, 64)])
def test_the_cpp_gru_equals_torchs(sizes, dtype, close: float, threads: int) -> None:
    steps, batch, size = sizes
    shapes = [(steps, batch, 3 * size), (3 * size, size), (3 * size,), *[(batch, size)] * 2]
    floats = [(torch.randn(*shape, dtype=dtype) * size**-0.25).requires_grad_() for shape in shapes]
    is_init = torch.rand(steps, batch) < 0.1
    scans = (gru_cpp.gru_cpp, gru.gru_recurrence)
    assert_scans_agree(scans, lambda scan: [scan(*floats[:4], is_init, floats[4])], floats, close, threads)


@BUILT
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (40, 13, 16), (33, 5, 35), (9, 23, 64)])
def test_the_cpp_lstm_equals_torchs(sizes, dtype, close: float, threads: int) -> None:
    steps, batch, size = sizes
    shapes = [(steps, batch, 4 * size), (4 * size, size), *[(batch, size)] * 4]
    floats = [(torch.randn(*shape, dtype=dtype) * size**-0.25).requires_grad_() for shape in shapes]
    is_init = torch.rand(steps, batch) < 0.1
    scans = (lstm_cpp.lstm_cpp, lstm.lstm_recurrence)
    assert_scans_agree(scans, lambda scan: scan(*floats[:4], is_init, *floats[4:]), floats, close, threads)


@BUILT
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.15's own checks
def test_the_operator_passes_torchs_checks() -> None:
    inputs, rate, states = torch.randn(T, B, 3 * D), torch.rand(D), torch.randn(2, B, D)
    is_init = torch.rand(T, B) < 0.3
    outputs = [torch.empty(T, B, D)]
    torch.library.opcheck(native._operator, ("recur", (T, B, D), [inputs, rate, *states], outputs, is_init, 0.0, None))
    sizes, x = (1, 3, 8, 4), torch.randn(3, 8)
    torch.library.opcheck(native._operator, ("norm", sizes, [x], [torch.empty(3, 8)], None, 1e-4, 2))


@BUILT
def test_the_cpp_scan_drops_the_state_before_a_reset() -> None:
    scan, arguments, initial = selective_cpp_case()
    h_0 = torch.full_like(arguments[-1], float("nan")).requires_grad_()
    is_init = torch.zeros(T, B, dtype=torch.bool)
    is_init[0] = True
    y, last = scan(*arguments[:-1], h_0, is_init, initial)
    grads = torch.autograd.grad(y.sum() + last.sum(), [*arguments[:-1], h_0, initial])
    assert all(bool(x.isfinite().all()) for x in (y, last, *grads))
    assert not grads[-2].any()


@BUILT
def test_far_decays_are_exact() -> None:
    """A step size of 1e-7 must leave 1 - 1e-7, and a step size of 1000 must leave zero."""
    ones = torch.ones(1, 1, 1)
    for size in (1e-7, 1e-3, 1.0, 80.0, 1000.0):
        h_0 = torch.ones(1, 1, 1)
        arguments = (
            0 * ones,
            size * ones,
            -torch.ones(1, 1),
            ones,
            ones,
            h_0,
            torch.zeros(1, 1, dtype=torch.bool),
            h_0,
        )
        _, last = selective_scan_cpp.selective_scan_cpp(*arguments)
        expected = torch.exp(-torch.tensor(size, dtype=torch.float64)).float()
        torch.testing.assert_close(last.squeeze(), expected, rtol=1.2e-7, atol=2e-38)
