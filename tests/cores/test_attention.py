"""Attention equals a slow loop over queries, for all options, and its cache is safe to store and to continue twice."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cyborg_torchrl.cores import AttentionCore, unroll
from cyborg_torchrl.cores import attention as module
from cyborg_torchrl.cores.kernels import window_attention
from cyborg_torchrl.cores.kernels.native import IS_BUILT
from cyborg_torchrl.cores.kernels.sliding_cache import SlidingCache

OPTIONS = [
    {"position": position, "gating": gating, "has_clock": has_clock, "num_layers": 2}
    for position, gating, has_clock in product(("relative", "rotary", "alibi"), ("none", "gru"), (False, True))
]


def build(**options: object) -> AttentionCore:
    core = AttentionCore(3, **{"hidden_size": 16, "window": 5, "num_heads": 2, **options})
    with torch.no_grad():
        for parameter in core.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return core.double()


def gate(weights: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gate of GTrXL, as its paper writes it."""
    w_r, w_z, w_n = weights.new.weight.chunk(3)
    u_r, u_z = weights.old.weight.chunk(2)
    b_r, b_z = weights.old.bias.chunk(2)
    y = y.clamp_min(0.0)
    r = torch.sigmoid(w_r @ y + u_r @ x + b_r)
    z = torch.sigmoid(w_z @ y + u_z @ x + b_z)
    n = torch.tanh(w_n @ y + weights.candidate.weight @ (r * x))
    return (1 - z) * x + z * n


def normalized(x: Tensor) -> Tensor:
    return x / ((x**2).mean(-1, keepdim=True) + 1e-5).sqrt()


def one_episode(core: AttentionCore, x: Tensor) -> Tensor:
    """Outputs [T, D] of one episode [T, F], query by query and head by head."""
    y = [core.input(x_t) for x_t in x]
    clock = [torch.zeros_like(y_t) for y_t in y]
    if core.clock is not None:
        for t in range(len(y)):
            angle = (t + 1) * core.speeds
            clock[t] = core.clock.weight @ torch.cat([angle.sin(), angle.cos()])
    for layer in core.layers:
        maps = []
        for y_t, clock_t in zip(y, clock, strict=True):
            place, content = layer.norms[0](y_t + clock_t), layer.norms[0](y_t)
            q, k = (layer.queries_keys.weight @ place).view(2, 2, 8)
            q, k = normalized(q) * layer.gain, normalized(k)
            maps.append(torch.stack([q, k, (layer.values.weight @ content).view(2, 8)]))
        out = []
        for t, y_t in enumerate(y):
            read = []
            for head in range(2):
                past = range(max(0, t - core.window), t + 1)
                products = []
                for s in past:
                    q, k = maps[t][0, head], maps[s][1, head]
                    if layer.turns is not None:  # rotate the query by the distance: the same angle between them
                        angle = (t - s) * layer.turns * (2 * math.pi / 40)  # turns in 8 windows
                        turn = torch.polar(torch.ones(4, dtype=torch.float64), angle)
                        rotated = torch.complex(q[:4], q[4:]) * turn
                        q = torch.cat([rotated.real, rotated.imag])
                    products.append(q @ k / math.sqrt(8) + layer.bias[head, t - s])
                weights = torch.stack(products).softmax(0)
                mean = sum(w * maps[s][2, head] for w, s in zip(weights, past, strict=True))
                read.append(normalized(mean))
            a = layer.output(torch.cat(read))
            z = gate(layer.gates[0], y_t, a) if layer.gates else y_t + a
            b = layer.mlp[2](F.relu(layer.mlp[0](layer.norms[1](z))))
            out.append(gate(layer.gates[1], z, b) if layer.gates else z + b)
        y = out
    return torch.stack(y)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_a_sequence_equals_a_loop_over_queries(options: dict) -> None:
    core = build(**options)
    x = torch.randn(2, 150, 3, dtype=torch.float64, requires_grad=True)  # more than two blocks
    is_init = torch.zeros(2, 150, dtype=torch.bool)
    is_init[:, 0], is_init[0, [3, 70]], is_init[1, 64] = True, True, True
    y, _ = core(x, core.initial_state(2), is_init)
    parts = [
        [one_episode(core, episode) for episode in x[row].tensor_split(is_init[row].nonzero()[1:, 0])]
        for row in range(2)
    ]
    expected = torch.stack([torch.cat(episodes) for episodes in parts])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    named = {"x": x, **dict(core.named_parameters())}
    weight = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad((each * weight).sum(), list(named.values())) for each in (y, expected))
    for name, a, b in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("steps", [1, 64, 70, 129])
def test_the_path_without_our_function_is_the_same(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """This path runs on a GPU, and where the step is exported."""
    core = build(num_layers=2)
    x, state = torch.randn(2, steps, 3).double(), core.initial_state(2)
    is_init = torch.rand(2, steps) < 0.05
    ours, last = core(x, state, is_init)
    monkeypatch.setattr(module.torch.compiler, "is_compiling", lambda: True)
    plain, plain_last = core(x, state, is_init)
    torch.testing.assert_close(plain, ours, rtol=0, atol=1e-12)
    assert all(torch.equal(last[name], plain_last[name]) or name != "count" for name in last)


@pytest.mark.skipif(not IS_BUILT, reason="nothing was built in C++")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"has_clock": False, "position": "alibi"}, {"num_layers": 2}])
@pytest.mark.parametrize(("heads", "size", "window"), [(4, 16, 60), (2, 32, 16), (3, 4, 39), (1, 8, 1)])
def test_a_step_in_cpp_equals_torch(options, heads: int, size: int, window: int, dtype, monkeypatch) -> None:
    """70 environments: more than the block of any processor, and not a multiple of it. Their episodes differ in age."""
    core = AttentionCore(5, hidden_size=heads * size, num_heads=heads, window=window, **options).to(dtype)
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(75, 70, 5, dtype=dtype)
    results: list[Tensor] = []
    for is_native in (True, False):
        monkeypatch.setattr(window_attention, "is_native", lambda tensor, is_native=is_native: is_native)
        state = {name: value.to(dtype) for name, value in core.initial_state(70).items()}
        reads = []
        with torch.no_grad():
            for t, x_t in enumerate(x):
                state = {name: value.clone() for name, value in state.items()}
                for value in state.values():
                    value[torch.arange(70) == t] = 0.0  # environment t starts an episode at step t
                y, state = core.step(x_t, state)
                reads.append(y)
        results.append(torch.cat([*reads, *(value.flatten(1) for value in state.values())], 1))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-4 if dtype is torch.float32 else 1e-12)


@pytest.mark.skipif(not IS_BUILT, reason="nothing was built in C++")
@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "window", "length"), [(16, 40, 1), (16, 9, 70), (32, 3, 6), (4, 64, 31), (20, 1, 7)])
def test_a_sequence_in_cpp_equals_torch(
    size: int, window: int, length: int, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients of all inputs. Episodes begin at any step, and the first one before the sequence."""
    steps = window + length
    shapes = ((3, 2, length, size), (3, 2, size, steps), (3, 2, steps, size), (2, window + 1))
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    age = torch.tensor([[1.0], [5.0], [1000.0]], dtype=dtype) + torch.arange(length)
    for row, start in ((0, length // 2), (1, length - 1), (2, length // 3)):
        age[row, start:] = torch.arange(1.0, length - start + 1)
    results: list[list[Tensor]] = []
    monkeypatch.setattr(window_attention.torch, "get_num_threads", lambda: threads)
    for is_native in (True, False):
        monkeypatch.setattr(module, "is_native", lambda tensor, is_native=is_native: is_native)
        read = module.attend(*inputs, age)
        weight = torch.linspace(-1.0, 1.0, read.numel(), dtype=dtype).view_as(read)
        results.append([read, *torch.autograd.grad((read * weight).sum(), inputs)])
    for name, ours, theirs in zip(("read", "q", "keys", "values", "bias"), *results, strict=True):
        tolerance = 2e-5 if dtype is torch.float32 else 1e-12
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_blank_steps_write_nothing_and_hide_nothing() -> None:
    """One symbol before 400 blank steps: what is read is nearly as large as after 3."""
    torch.manual_seed(0)
    core = AttentionCore(3, window=500, has_clock=False)
    reads: dict[int, Tensor] = {}
    for steps in (3, 400):
        x = torch.zeros(1, steps + 1, 3)
        x[0, 0, 0] = 1.0
        is_init = torch.zeros(1, steps + 1, dtype=torch.bool)
        reads[steps] = core(x, core.initial_state(1), is_init)[0][0, -1]
    assert reads[400].norm() > 0.4 * reads[3].norm()
    assert torch.cosine_similarity(reads[400], reads[3], dim=0) > 0.8


def test_a_state_can_be_stored_and_continued_twice() -> None:
    core = build()
    x = torch.randn(40, 2, 3).double()
    with torch.no_grad():
        state, stored = core.initial_state(2), []
        for x_t in x:
            stored.append((state, copy.deepcopy(state)))
            state = core.step(x_t, state)[1]
        assert all(torch.equal(state[name], kept[name]) for state, kept in stored for name in state)
        seventh = stored[7][0]
        first, after = core.step(x[7], seventh)
        second, _ = core.step(x[8], seventh)
        kept = {name: value.clone() for name, value in after.items()}
        assert torch.equal(core.step(x[7], seventh)[0], first)
        assert not torch.equal(first, second)
        assert all(torch.equal(after[name], kept[name]) for name in after)


def test_a_cache_is_copied_once_in_a_window() -> None:
    sliding, cache = SlidingCache(1), torch.zeros(2, 8, 3)
    buffers = set()
    for t in range(80):
        longer = sliding.extend(cache)
        longer[:, -1] = float(t)
        buffers.add(longer.untyped_storage().data_ptr())
        cache = longer[:, 1:]
        expected = [max(0, s) for s in range(t - 7, t + 1)]
        assert cache[0, :, 0].tolist() == expected
    assert len(buffers) <= 10
    assert pickle.loads(pickle.dumps(sliding))._buffer is None


def test_steps_are_counted_exactly_in_bfloat16() -> None:
    core = AttentionCore(3, hidden_size=8, window=2, num_heads=1, has_clock=True)
    state = core.initial_state(1)
    state["count"] = core._count(torch.tensor([299_999.0]))
    rounded = {name: value.bfloat16().float() for name, value in state.items()}
    _, last = core.step(torch.zeros(1, 3), rounded)
    assert float((last["count"] * core.digits).sum()) == 300_000.0


def test_positions_stay_exact_in_long_episodes() -> None:
    """After 100,000 steps rotary attention reads as at the start: only distances count."""
    core = build(position="rotary", has_clock=False).float()
    x = torch.randn(1, 30, 3)
    is_init = torch.zeros(1, 30, dtype=torch.bool)
    with torch.no_grad():
        begun = core(x, core.initial_state(1), is_init)[1]
        old = {**begun, "count": core._count(torch.tensor([30.0 + 2500 * core.layers[0].period]))}
        torch.testing.assert_close(core(x, old, is_init)[0], core(x, begun, is_init)[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(core(x, old, is_init)[0], unroll(core, x, old, is_init)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be >= 1; got 0"),
        ({"hidden_size": 12}, "hidden_size must be a multiple of 2 \\* num_heads = 8; got 12"),
        ({"position": "rotery"}, "unknown position 'rotery': did you mean 'rotary'"),
        ({"gating": "lstm"}, "unknown gating 'lstm'"),
    ],
)
def test_options_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionCore(3, **options)
