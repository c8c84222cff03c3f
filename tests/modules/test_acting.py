"""An agent's step in one C++ call: against formulas in plain torch, and wherever it has to keep out."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch.nn import functional as F
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, Composite, Unbounded

from cyborg_torchrl.build import build_agent, build_env
from cyborg_torchrl.collectors import FusedCollector, RolloutCollector
from cyborg_torchrl.config import load_config
from cyborg_torchrl.cores import build_gru, build_lru, build_lstm, fixed_parameters
from cyborg_torchrl.cores.linear import Linear
from cyborg_torchrl.cores.native import IS_BUILT
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder
from cyborg_torchrl.modules.acting import NativeStep, Parts
from cyborg_torchrl.modules.native_network import NativeNetwork

pytestmark = pytest.mark.skipif(not IS_BUILT, reason="nothing was built in C++ here")
CORES = {"lru": build_lru, "lstm": build_lstm, "gru": build_gru}
SPEC = Categorical(4, shape=())


def agent_of(memory: str = "lru", observed: int = 6, width: int = 16, actions: int = 4, **options) -> PPOAgent:
    """An agent with parameters that are all random."""
    torch.manual_seed(0)
    features = options.pop("features", width)
    spec = Composite(observation=Unbounded((observed,)))
    if options.pop("two_keys", False):
        spec["previous_action"] = Unbounded((2,))
    encoder = build_encoder(spec, batch_dims=0, features=features, hidden_sizes=options.pop("hidden_sizes", ()))
    action_spec = options.pop("action_spec", Categorical(actions, shape=()))
    is_gated = options.pop("is_gated", False)
    core = CORES[memory](features, hidden_size=width, max_horizon=50, **options)
    agent = PPOAgent(encoder, Backbone(core), action_spec, is_gated=is_gated)
    for name, parameter in agent.named_parameters():
        if "rate" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return agent


def parts_of(agent: PPOAgent) -> Parts:
    return Parts(agent.encoder, agent.backbone, agent.fusion, agent.policy_head, agent.value_head)


def network_of(agent: PPOAgent) -> NativeNetwork | None:
    with torch.no_grad():
        return NativeStep().of(parts_of(agent))


def given(agent: PPOAgent, batch: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, dict]:
    """Observations and states that do not lie side by side in memory."""
    observed, width = agent.encoder.module.last.in_features, agent.backbone.core.out_features
    names = agent.backbone.core.state_shapes
    states = {name: torch.randn(batch, 1, 2 * width, dtype=dtype)[..., ::2] for name in names}
    return torch.randn(observed, batch, dtype=dtype).t(), states


def reference(agent: PPOAgent, x: torch.Tensor, state: dict) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """The same from the equations, in double precision."""
    agent = copy.deepcopy(agent).double()
    x, state = x.double(), {name: value.double().squeeze(1) for name, value in state.items()}
    layer, fusion = agent.backbone.core.layers[0], agent.fusion.module
    features = x @ agent.encoder.module.last.weight.t()
    if len(state) == 1:
        opening, gate = torch.sigmoid(layer.decay_gate(features)), torch.sigmoid(layer.input_gate(features))
        loss = torch.expm1(-2 * opening * F.softplus(layer.rate))
        after = {"hidden": (1 + loss) * state["hidden"] + (-loss * (2 + loss)).sqrt() * gate * layer.input(features)}
    else:
        cell = torch.nn.LSTMCell(features.shape[1], layer.features).double()
        weights = {"weight_ih": layer.weight_ih, "weight_hh": layer.weight_hh, "bias_hh": 0 * layer.bias_hh}
        bias = (layer.bias_ih + layer.bias_hh) * layer.bias_mask
        cell.load_state_dict({**weights, "bias_ih": bias})
        after = dict(zip(("hidden", "cell"), cell(features, (state["hidden"], state["cell"])), strict=True))
    groups = after["hidden"].unflatten(1, (agent.backbone.core.readouts[0].groups, -1))
    readout = (groups / (groups.square().mean(-1, keepdim=True) + 1e-12).sqrt()).flatten(1)
    joint = fusion.past(readout) + fusion.present(features)
    return agent.policy_head.module(joint), agent.value_head.module(joint), after


SIZES = [(6, 128, 4, 64), (3, 5, 1, 7), (40, 33, 3, 17), (16, 16, 21, 1), (1, 64, 2, 300)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("memory", ["lru", "lstm"])
@torch.no_grad()
def test_it_is_what_the_equations_say(memory, sizes, dtype, tolerance, threads) -> None:
    observed, width, actions, batch = sizes
    agent = agent_of(memory, observed, width, actions, input_bias=width == 33).to(dtype)
    x, state = given(agent, batch, dtype)
    assert not x.is_contiguous() or 1 in (observed, batch)
    network, before = network_of(agent), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        acted = network(x, state)
    finally:
        torch.set_num_threads(before)
    policy, value, after = reference(agent, x, state)
    assert acted.policy.dtype is acted.value.dtype is acted.state["hidden"].dtype is dtype
    torch.testing.assert_close(acted.policy.double(), policy, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(acted.value.double(), value, rtol=tolerance, atol=tolerance)
    for name, expected in after.items():
        torch.testing.assert_close(acted.state[name].double(), expected.unsqueeze(1), rtol=tolerance, atol=tolerance)


class MyLinear(Linear):
    """Somebody's own."""


def _hooked(get) -> object:
    return lambda agent: get(agent).register_forward_hook(lambda *_: None)


def _shadowed(agent: PPOAgent) -> None:
    agent.fusion.module.forward = type(agent.fusion.module).forward.__get__(agent.fusion.module)


def _replaced(agent: PPOAgent) -> None:
    agent.policy_head.module = MyLinear(16, 4)


def _rewired(agent: PPOAgent) -> None:
    agent.fusion = TensorDictModule(agent.fusion.module, ["features", "features"], ["joint_features"])


def _deeper(agent: PPOAgent) -> None:
    agent.encoder.module.network.append(torch.nn.SiLU())


OTHERS = {
    "gru": {"memory": "gru"},
    "two layers": {"num_layers": 2},
    "no norm": {"readout": "none"},
    "two widths": {"features": 12},
    "gated": {"is_gated": True},
    "a deeper encoder": {"hidden_sizes": (8,)},
    "two observations": {"two_keys": True},
    "continuous": {"action_spec": Bounded(-1.0, 1.0, (2,))},
}
CHANGES = {
    "a hook": _hooked(lambda agent: agent.encoder),
    "a hook inside": _hooked(lambda agent: agent.backbone.core.readouts[0]),
    "a hook before": lambda agent: agent.fusion.module.past.register_forward_pre_hook(lambda *_: None),
    "a forward of its own": _shadowed,
    "a head of a kind": _replaced,
    "another order": _rewired,
    "a layer more": _deeper,
    "bfloat16": lambda agent: agent.to(torch.bfloat16),
    "two types": lambda agent: agent.value_head.double(),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_built_otherwise_is_left_to_torch(other: str) -> None:
    assert network_of(agent_of()) is not None
    assert network_of(agent_of(**OTHERS[other])) is None


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_is_changed_later_is_left_to_torch(change: str) -> None:
    agent, step = agent_of(), NativeStep()
    x, state = given(agent, 3)
    assert step.of(parts_of(agent))(x, state) is not None
    CHANGES[change](agent)
    network = step.of(parts_of(agent))
    assert network is None or network(x, state) is None


@torch.no_grad()
def test_it_keeps_out_of_gradients_autocast_and_transforms() -> None:
    agent, step = agent_of(), NativeStep()
    found = []
    torch.func.vmap(lambda x: found.append(step.of(parts_of(agent))) or x)(torch.zeros(2))
    with torch.autocast("cpu"):
        found.append(step.of(parts_of(agent)))
    with torch.enable_grad():
        found.append(step.of(parts_of(agent)))
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    found.append(step.of(parts_of(agent)))
    everywhere.remove()
    assert found == [None] * 4
    assert step.of(parts_of(agent)) is not None


@pytest.mark.parametrize("wrong", ["observation", "state", "type", "none"])
@torch.no_grad()
def test_what_does_not_fit_is_left_to_torch_to_refuse(wrong: str) -> None:
    agent = agent_of()
    x, state = given(agent, 0 if wrong == "none" else 3)
    x = x[:, 1:] if wrong == "observation" else x
    state = {"state": {"hidden": torch.zeros(3, 1, 15)}, "type": {"hidden": torch.zeros(3, 1, 16).double()}}.get(
        wrong, state
    )
    assert network_of(agent)(x, state) is None


@torch.no_grad()
def test_parameters_that_are_swapped_are_used_at_once() -> None:
    agent = agent_of()
    network = network_of(agent)
    x, state = given(agent, 3)
    first = network(x, state).value
    agent.value_head.module.bias.data += 1.0  # leaves no trace
    torch.testing.assert_close(network(x, state).value, first + 1.0)
    with fixed_parameters():
        second = network(x, state).value
        agent.value_head.module.bias = torch.nn.Parameter(agent.value_head.module.bias + 2.0)
        torch.testing.assert_close(network(x, state).value, second + 2.0)
    agent.value_head.module.bias = torch.nn.Parameter(torch.zeros(2))
    assert network(x, state) is None, "C++ would read beyond the end"


def acted(agent: PPOAgent, tensordict: TensorDict) -> TensorDict:
    torch.manual_seed(1)
    with torch.no_grad():
        return agent(tensordict.clone())


def by_modules(agent: PPOAgent, tensordict: TensorDict) -> TensorDict:
    hook = agent.fusion.register_forward_hook(lambda *_: None)
    try:
        return acted(agent, tensordict)
    finally:
        hook.remove()


@pytest.mark.parametrize("shape", [[], [5], [2, 3]], ids=str)
@pytest.mark.parametrize("memory", ["lru", "lstm"])
def test_an_agent_writes_what_its_modules_do(memory: str, shape: list[int], monkeypatch) -> None:
    agent = agent_of(memory, learn_initial_state=True)
    is_init = torch.rand(*shape, 1) < 0.5
    states = {name: torch.randn(*shape, 1, 16) for name in agent.backbone.state_keys}
    for state in states.values():
        state[is_init.squeeze(-1)] = torch.nan  # whatever was there before is forgotten
    tensordict = TensorDict(
        {"observation": torch.randn(*shape, 6), "is_init": is_init, "memory_state": states}, batch_size=shape
    )
    expected = by_modules(agent, tensordict)
    calls = counted(monkeypatch)
    found = acted(agent, tensordict)
    assert len(calls) == 1
    assert found.batch_size == expected.batch_size
    assert set(found.keys(True, True)) == set(expected.keys(True, True))
    for key in expected.keys(True, True):
        if key != ("memory_state", "hidden") and key != ("memory_state", "cell"):
            assert found[key].dtype is expected[key].dtype
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5)


def test_a_hook_has_its_effect() -> None:
    agent = agent_of()
    tensordict = TensorDict(
        {
            "observation": torch.randn(5, 6),
            "is_init": torch.ones(5, 1, dtype=torch.bool),
            "memory_state": {"hidden": torch.zeros(5, 1, 16)},
        },
        [5],
    )
    assert acted(agent, tensordict)["state_value"].std() > 0
    agent.fusion.module.register_forward_hook(lambda module, inputs, joint: 0 * joint)
    value = agent.value_head.module.bias.detach().expand(5, 1)
    assert torch.equal(acted(agent, tensordict)["state_value"], value)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))], ids=["deep", "pickle"]
)
@torch.no_grad()
def test_a_copy_acts_by_itself(copied) -> None:
    agent = agent_of()
    x, state = given(agent, 5)
    tensordict = TensorDict(
        {"observation": x, "is_init": torch.zeros(5, 1, dtype=torch.bool), "memory_state": state}, [5]
    )
    before = acted(agent, tensordict)
    other = copied(agent)
    for parameter in agent.parameters():
        parameter.zero_()
    assert torch.equal(acted(other, tensordict)["state_value"], before["state_value"])
    assert not acted(agent, tensordict)["state_value"].any()


def counted(monkeypatch) -> list[NativeNetwork]:
    """The C++ calls from here on that did something."""
    calls: list[NativeNetwork] = []
    run = NativeNetwork.__call__

    def call(self, observation, state):
        result = run(self, observation, state)
        if result is not None:
            calls.append(self)
        return result

    monkeypatch.setattr(NativeNetwork, "__call__", call)
    return calls


@pytest.mark.parametrize("memory", ["lru", "lstm"])
def test_all_collectors_act_by_it_and_alike(memory: str, monkeypatch) -> None:
    steps, found = 20, {}
    for kind in (FusedCollector, Collector, RolloutCollector):
        torch.manual_seed(0)
        cfg = load_config(overrides=["env=delayed_cue", "env.horizon=5", f"backbone={memory}", "env.num_envs=3"])
        env = build_env(cfg)
        agent = build_agent(cfg, env)
        more = (
            {"value_operator": agent.get_value_operator()}
            if kind is RolloutCollector
            else {"auto_register_policy_transforms": True}
        )
        made = kind(env, agent, frames_per_batch=3 * steps, total_frames=6 * steps, **more)
        made.set_seed(3)
        torch.manual_seed(5)
        calls = counted(monkeypatch)
        batches = [batch.steps if kind is RolloutCollector else batch.clone() for batch in made]
        assert len(calls) >= 2 * steps
        monkeypatch.undo()
        found[kind] = torch.cat(batches, 1)
    for kind in (FusedCollector, RolloutCollector):
        for key in ("observation", "action", "action_log_prob", "state_value", "logits", ("next", "reward")):
            assert torch.equal(found[kind][key], found[Collector][key]), key
