"""Our cores in a Backbone do what TorchRL's GRUModule and LSTMModule do with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

from cyborg_torchrl.cores import build_gru, build_lstm
from cyborg_torchrl.modules import Backbone

BATCH, STEPS, FEATURES, HIDDEN = 3, 12, 4, 6


class Pair(NamedTuple):
    """Our module and TorchRL's, and TorchRL's state keys in the order of ours."""

    ours: Backbone
    theirs: TensorDictModuleBase
    state_keys: dict[str, str]


def pair(kind: str, num_layers: int) -> Pair:
    build: Callable = build_gru if kind == "gru" else build_lstm
    core = build(FEATURES, hidden_size=HIDDEN, num_layers=num_layers, readout="none", input_bias=True)
    names = {"hidden": "recurrent_state"} if kind == "gru" else {"hidden": "state_h", "cell": "state_c"}
    module_class = GRUModule if kind == "gru" else LSTMModule
    theirs = module_class(
        FEATURES,
        HIDDEN,
        num_layers,
        in_keys=["features", *names.values()],
        out_keys=["memory_features", *(("next", name) for name in names.values())],
    )
    network = theirs.gru if kind == "gru" else theirs.lstm
    with torch.no_grad():
        for index, layer in enumerate(core.layers):
            for name, parameter in layer.named_parameters():
                parameter.normal_(std=0.4)
                getattr(network, f"{name}_l{index}").copy_(parameter)
    return Pair(Backbone(core).double(), theirs.double(), names)


@pytest.fixture(params=[(kind, layers) for kind in ("gru", "lstm") for layers in (1, 2)], ids=str)
def modules(request: pytest.FixtureRequest) -> Pair:
    return pair(*request.param)


def flags() -> Tensor:
    is_init = torch.zeros(BATCH, STEPS, 1, dtype=torch.bool)
    is_init[0, 0] = is_init[1, 4] = is_init[1, 9] = True
    return is_init


def test_step_by_step(modules: Pair) -> None:
    features, is_init = torch.randn(BATCH, STEPS, FEATURES).double(), flags()
    shape = (BATCH, *modules.ours.core.state_shapes["hidden"])
    start = {name: torch.randn(shape).double() for name in modules.state_keys}
    ours = TensorDict({"memory_state": start}, [BATCH])
    theirs = TensorDict({modules.state_keys[name]: value for name, value in start.items()}, [BATCH])
    for t in range(STEPS):
        for td in (ours, theirs):
            td.update({"features": features[:, t], "is_init": is_init[:, t]})
        ours, theirs = modules.ours(ours), modules.theirs(theirs)
        torch.testing.assert_close(ours["memory_features"], theirs["memory_features"], rtol=0, atol=1e-12)
        for name, key in modules.state_keys.items():
            following = ours["next", "memory_state", name]
            torch.testing.assert_close(following, theirs["next", key], rtol=0, atol=1e-12)
            ours["memory_state", name] = following
            theirs[key] = theirs["next", key]


def test_sequences_and_their_gradients(modules: Pair) -> None:
    is_init = flags()
    features = torch.randn(BATCH, STEPS, FEATURES, dtype=torch.float64, requires_grad=True)
    shape = (BATCH, *modules.ours.core.state_shapes["hidden"])
    start = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name in modules.state_keys}
    # TorchRL takes the stored state wherever an episode begins; a collector stores zeros there
    is_new = (is_init.cumsum(1) > 0).unsqueeze(-1)
    stored = {name: value.unsqueeze(1).expand(-1, STEPS, -1, -1) for name, value in start.items()}
    stored = {name: value.masked_fill(is_new, 0.0) for name, value in stored.items()}
    common = {"features": features, "is_init": is_init}
    batch = [BATCH, STEPS]
    ours = TensorDict({**common, "memory_state": TensorDict(stored, batch)}, batch)
    theirs = TensorDict({**common, **{modules.state_keys[n]: value for n, value in stored.items()}}, batch)
    with set_recurrent_mode(True):
        y, expected = modules.ours(ours)["memory_features"], modules.theirs(theirs)["memory_features"]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)

    weight = torch.randn(y.shape)
    inputs = [features, *start.values()]
    grads = torch.autograd.grad((weight * y).sum(), [*inputs, *modules.ours.parameters()], retain_graph=True)
    reference = torch.autograd.grad((weight * expected).sum(), [*inputs, *modules.theirs.parameters()])
    for grad, other in zip(grads, reference, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-12)


def test_the_sequence_mode_is_the_step_mode(modules: Pair) -> None:
    """Across the two libraries: TorchRL's steps against our sequence."""
    features, is_init = torch.randn(BATCH, STEPS, FEATURES).double(), flags()
    is_init[:, 0] = True
    shape = (BATCH, *modules.ours.core.state_shapes["hidden"])
    states = {key: torch.zeros(shape).double() for key in modules.state_keys.values()}
    outputs = []
    for t in range(STEPS):
        td = modules.theirs(TensorDict({"features": features[:, t], "is_init": is_init[:, t], **states}, [BATCH]))
        states = {key: td["next", key] for key in states}
        outputs.append(td["memory_features"])
    td = TensorDict({"features": features, "is_init": is_init}, [BATCH, STEPS])
    with set_recurrent_mode(True):
        last = modules.ours.run(td)
    torch.testing.assert_close(td["memory_features"], torch.stack(outputs, 1), rtol=0, atol=1e-12)
    for name, key in modules.state_keys.items():
        torch.testing.assert_close(last[name], states[key], rtol=0, atol=1e-12)
