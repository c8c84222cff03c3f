"""The hand-written recurrences: numerical gradients, slow references, and torch's own networks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

from cyborg_torchrl.cores import (
    BistableLayer,
    GRULayer,
    LRULayer,
    LSTMLayer,
    MinGRULayer,
    RecurrentLayer,
    RNNLayer,
    build_bistable,
    build_gru,
    build_lru,
    build_lstm,
    build_min_gru,
    build_rnn,
    gated_linear_scan,
)
from cyborg_torchrl.cores.lru_complex import ComplexLRULayer

STEPS, BATCH, FEATURES, HIDDEN = 5, 3, 2, 4


def tanh_layer(in_features: int, hidden_size: int, _: int) -> RNNLayer:
    return RNNLayer(in_features, hidden_size)


def relu_layer(in_features: int, hidden_size: int, _: int) -> RNNLayer:
    return RNNLayer(in_features, hidden_size, "relu")


def bistable_layer(in_features: int, hidden_size: int, _: int) -> BistableLayer:
    layer = BistableLayer(in_features, hidden_size)
    with torch.no_grad():
        layer.weights.normal_()  # they start at zero
    return layer


LAYERS = [GRULayer, LSTMLayer, LRULayer, ComplexLRULayer, MinGRULayer, tanh_layer, relu_layer, bistable_layer]


def resets() -> Tensor:
    """Return resets [T, B]: a row without, a row with the first step, a row with the last and two successive steps."""
    is_init = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    is_init[0, 1] = is_init[3, 1] = is_init[3, 2] = is_init[4, 2] = True
    return is_init


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("is_init", [resets(), torch.zeros_like(resets())], ids=["resets", "none"])
def test_scan_gradcheck(is_init: Tensor) -> None:
    decay = torch.rand(STEPS, BATCH, HIDDEN, dtype=torch.float64, requires_grad=True)
    inputs = (decay, leaf(STEPS, BATCH, HIDDEN), leaf(BATCH, HIDDEN), leaf(BATCH, HIDDEN))
    assert torch.autograd.gradcheck(lambda a, b, h, start: gated_linear_scan(a, b, h, is_init, start), inputs)


def test_scan_by_hand() -> None:
    """Starts from 8, restarts from -2 before step 2: 8/2 + 1, 5/2 + 0, -2/4 + 3, 2.5 * 0 + 1."""
    decay = torch.tensor([0.5, 0.5, 0.25, 0.0]).view(4, 1, 1)
    drive = torch.tensor([1.0, 0.0, 3.0, 1.0]).view(4, 1, 1)
    is_init = torch.tensor([False, False, True, False]).view(4, 1)
    states = gated_linear_scan(decay, drive, torch.tensor([[8.0]]), is_init, torch.tensor([[-2.0]]))
    assert states.flatten().tolist() == [5.0, 2.5, 2.5, 1.0]


def test_scan_needs_a_step() -> None:
    empty = torch.zeros(0, 1, 1)
    with pytest.raises(ValueError, match="T == 0"):
        gated_linear_scan(empty, empty, torch.zeros(1, 1), torch.zeros(0, 1, dtype=torch.bool), torch.zeros(1, 1))


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_scan_at_the_ends_of_the_range(decay: float) -> None:
    drive = torch.randn(STEPS, BATCH, HIDDEN)
    h_0 = torch.randn(BATCH, HIDDEN)
    is_init = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    states = gated_linear_scan(torch.full_like(drive, decay), drive, h_0, is_init, torch.zeros_like(h_0))
    expected = drive if decay == 0.0 else h_0 + drive.cumsum(0)
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer_class", LAYERS)
@pytest.mark.parametrize("is_init", [resets(), torch.zeros_like(resets())], ids=["resets", "none"])
def test_layer_gradcheck(layer_class: Callable[..., RecurrentLayer], is_init: Tensor) -> None:
    layer = layer_class(FEATURES, HIDDEN, 10).double()
    names = [name for name, _ in layer.named_parameters()]
    values = [leaf(*parameter.shape) for parameter in layer.parameters()]
    num_states = len(layer.state_names)
    states = [leaf(BATCH, HIDDEN) for _ in range(2 * num_states)]

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        state, initial = rest[:num_states], rest[num_states : 2 * num_states]
        parameters = dict(zip(names, rest[2 * num_states :], strict=True))
        y, last = torch.func.functional_call(layer, parameters, (x, state, is_init, initial))
        return y, *last

    assert torch.autograd.gradcheck(run, (leaf(STEPS, BATCH, FEATURES), *states, *values))


@pytest.mark.parametrize("layer_class", LAYERS)
def test_layer_gradients_equal_its_steps(layer_class: Callable[..., RecurrentLayer]) -> None:
    layer = layer_class(FEATURES, HIDDEN, 10).double()
    x, is_init = leaf(STEPS, BATCH, FEATURES), resets()
    state = tuple(leaf(BATCH, HIDDEN) for _ in layer.state_names)
    initial = tuple(leaf(BATCH, HIDDEN) for _ in layer.state_names)
    inputs = [x, *state, *initial, *layer.parameters()]
    weights = [torch.randn(STEPS, BATCH, HIDDEN), *(torch.randn(BATCH, HIDDEN) for _ in state)]

    def gradients(y: Tensor, last: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((w * v).sum() for w, v in zip(weights, (y, *last), strict=True)), inputs)

    y, last = layer(x, state, is_init, initial)
    carried, outputs = state, []
    for t in range(STEPS):
        mask = is_init[t].unsqueeze(-1)
        carried = tuple(torch.where(mask, i, s) for i, s in zip(initial, carried, strict=True))
        y_t, carried = layer.step(x[t], carried)
        outputs.append(y_t)
    torch.testing.assert_close(y, torch.stack(outputs), rtol=0, atol=1e-12)
    for ours, expected in zip(gradients(y, last), gradients(torch.stack(outputs), carried), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("build", "network"), [(build_gru, nn.GRU), (build_lstm, nn.LSTM)], ids=["gru", "lstm"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_equals_torch(build: Callable, network: type[nn.RNNBase], num_layers: int) -> None:
    core = build(FEATURES, hidden_size=HIDDEN, num_layers=num_layers, readout="none", input_bias=True).double()
    reference = network(FEATURES, HIDDEN, num_layers, batch_first=True).double()
    for index, layer in enumerate(core.layers):
        weights = {
            name.removesuffix(f"_l{index}"): value.detach()
            for name, value in reference.named_parameters()
            if name.endswith(f"_l{index}")
        }
        layer.load_state_dict(weights)
    x = leaf(BATCH, 20, FEATURES)
    state = {name: leaf(BATCH, num_layers, HIDDEN) for name in core.state_shapes}
    theirs = tuple(value.transpose(0, 1) for value in state.values())
    y, last = core(x, state, torch.zeros(BATCH, 20, dtype=torch.bool))
    expected, expected_last = reference(x, theirs if network is nn.LSTM else theirs[0])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    expected_last = expected_last if network is nn.LSTM else (expected_last,)
    for ours, other in zip(last.values(), expected_last, strict=True):
        torch.testing.assert_close(ours, other.transpose(0, 1), rtol=0, atol=1e-12)
    weight = torch.randn(y.shape)
    inputs = [x, *state.values()]
    ours = torch.autograd.grad((weight * y).sum(), [*inputs, *core.layers.parameters()])
    other = torch.autograd.grad((weight * expected).sum(), [*inputs, *reference.parameters()])
    for a, b in zip(ours, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_lru_by_hand() -> None:
    """With all gates at 1/2: log a = -softplus(rate), b = sqrt(1 - a^2) x / 2; rate chosen so that a = 0.6."""
    layer = LRULayer(1, 1, 10)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.input.weight.fill_(1.0)
        layer.rate.fill_(math.log(math.expm1(-math.log(0.6))))
    h_1, _ = layer.step(torch.tensor([[5.0]]), (torch.tensor([[10.0]]),))
    torch.testing.assert_close(h_1, torch.tensor([[0.6 * 10 + 0.8 * 0.5 * 5]]))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_rnn_equals_torch(nonlinearity: str) -> None:
    core = build_rnn(FEATURES, hidden_size=HIDDEN, num_layers=2, nonlinearity=nonlinearity).double()
    reference = nn.RNN(FEATURES, HIDDEN, 2, nonlinearity=nonlinearity, batch_first=True).double()
    with torch.no_grad():
        for index, layer in enumerate(core.layers):
            layer.input.weight.copy_(getattr(reference, f"weight_ih_l{index}"))
            layer.recurrent.copy_(getattr(reference, f"weight_hh_l{index}"))
            layer.input.bias.copy_(getattr(reference, f"bias_ih_l{index}"))
            getattr(reference, f"bias_hh_l{index}").zero_()
    x, hidden = leaf(BATCH, 20, FEATURES), leaf(BATCH, 2, HIDDEN)
    y, last = core(x, {"hidden": hidden}, torch.zeros(BATCH, 20, dtype=torch.bool))
    expected, expected_last = reference(x, hidden.transpose(0, 1))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(last["hidden"], expected_last.transpose(0, 1), rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(each.square().sum(), [x, hidden]) for each in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_rnn_starts_as_its_papers_say() -> None:
    eye = torch.eye(8)
    assert torch.equal(RNNLayer(3, 8, "relu").recurrent, eye)
    weight = RNNLayer(3, 8).recurrent
    torch.testing.assert_close(weight @ weight.t(), eye, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="unknown nonlinearity 'sigmoid'"):
        build_rnn(3, nonlinearity="sigmoid")


def test_bistable_by_hand() -> None:
    """a = 1 + tanh(1 + 2), c = sigmoid(-1 + 0.5 * 2) = 1/2, halfway between 2 and tanh(3 + a * 2)."""
    layer = BistableLayer(1, 1)
    with torch.no_grad():
        layer.maps.weight.copy_(torch.tensor([[1.0], [-1.0], [3.0]]))
        layer.biases.zero_()
        layer.weights.copy_(torch.tensor([[1.0], [0.5]]))
    h_1, _ = layer.step(torch.ones(1, 1), (torch.full((1, 1), 2.0),))
    expected = 1.0 + 0.5 * math.tanh(3.0 + 2.0 * (1.0 + math.tanh(3.0)))
    torch.testing.assert_close(h_1, torch.tensor([[expected]]))


def test_a_bistable_unit_keeps_its_bit() -> None:
    """100,000 noisy steps later the unit has its sign, and without noise the value that solves h = tanh(a h)."""
    core = build_bistable(2, hidden_size=8)
    signs = torch.randint(0, 2, (4, 1, 8)) * 2.0 - 1.0
    noise = 0.02 * torch.randn(4, 100_000, 2)
    noise[:, -1000:] = 0.0
    with torch.no_grad():
        y, _ = core(noise, {"hidden": 0.3 * signs}, torch.zeros(4, 100_000, dtype=torch.bool))
    assert torch.equal(y.sign(), signs.expand_as(y))
    slope = 1.0 + math.tanh(1.0)
    value = scipy.optimize.brentq(lambda h: math.tanh(slope * h) - h, 0.1, 1.0)
    torch.testing.assert_close(y[:, -1], value * signs.squeeze(1), rtol=0, atol=1e-5)


def test_complex_lru_by_hand() -> None:
    """All gates at 1/2, a = 0.6 and a quarter turn: 0.6 i (10 + 5 i) + 0.8 / 2 * (5 + 2.5 i)."""
    layer = ComplexLRULayer(1, 2, 10)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.input.weight.copy_(torch.tensor([[1.0], [0.5]]))
        layer.rate.fill_(math.log(math.expm1(-math.log(0.6))))
        layer.angle.fill_(math.pi / 2)
    h_1, _ = layer.step(torch.tensor([[5.0]]), (torch.tensor([[10.0, 5.0]]),))
    torch.testing.assert_close(h_1, torch.tensor([[-0.6 * 5 + 0.4 * 5, 0.6 * 10 + 0.4 * 2.5]]))
    with pytest.raises(ValueError, match="is_complex needs an even hidden_size; got 3"):
        build_lru(3, is_complex=True, hidden_size=3)


def test_min_gru_by_hand() -> None:
    """A gate of 1/4 between a state of 10 and a candidate of 2 * 3: 0.75 * 10 + 0.25 * 6 = 9."""
    layer = MinGRULayer(1, 1, 10)
    with torch.no_grad():
        layer.maps.weight.copy_(torch.tensor([[0.0], [2.0]]))
        layer.gate_bias.fill_(math.log(0.25 / 0.75))
    h_1, _ = layer.step(torch.tensor([[3.0]]), (torch.tensor([[10.0]]),))
    torch.testing.assert_close(h_1, torch.tensor([[9.0]]))


@pytest.mark.parametrize("build", [build_gru, build_lstm, build_lru, build_min_gru])
def test_builders_refuse_impossible_options(build: Callable) -> None:
    for option in ("hidden_size", "num_layers", "max_horizon"):
        with pytest.raises(ValueError, match=f"{option} must be >= 1; got 0"):
            build(3, **{option: 0})
    with pytest.raises(ValueError, match=r"unknown readout 'norm'; known: timescale_norm, none"):
        build(3, readout="norm")
    with pytest.raises(ValueError, match="groups must be >= 1; got 0"):
        build(3, readout_groups=0)


@pytest.mark.parametrize("build", [build_gru, build_lstm, build_lru, build_min_gru])
@pytest.mark.parametrize("horizon", [10, 1000])
def test_memories_keep_for_as_long_as_the_horizon(build: Callable, horizon: int) -> None:
    """The slowest channel forgets less than a fifth over the horizon, the fastest nearly all within ten steps."""
    core = build(2, hidden_size=8, max_horizon=horizon, readout="none")
    state = {name: torch.full((1, 1, 8), 0.1) for name in core.state_shapes}
    blank = torch.zeros(1, horizon, 2)
    is_init = torch.zeros(1, horizon, dtype=torch.bool)
    with torch.no_grad():
        for parameter in core.parameters():
            if parameter.ndim == 2:
                parameter.zero_()  # biases and rates hold the time-scales
        for module in core.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        _, last = core(blank, state, is_init)
    kept = list(last.values())[-1].flatten() / 0.1
    assert kept[-1] > 0.8
    assert kept[0] < 0.1
    assert (kept[1:] >= kept[:-1]).all(), "channels are ordered by time-scale"
