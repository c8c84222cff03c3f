"""The C++ step of an agent: against formulas, against the step of torch, and for networks that it does not support."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.data import Bounded, Categorical, Composite, Unbounded

from cyborg_torchrl.collectors import FusedCollector, RolloutCollector
from cyborg_torchrl.collectors.backbone_step import BackboneStep
from cyborg_torchrl.collectors.compiled_step import CompiledStep, Networks, compile_step
from cyborg_torchrl.config import load_config
from cyborg_torchrl.cores import build_gru, build_lru, build_lstm
from cyborg_torchrl.cores.kernels.native import IS_BUILT
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder
from cyborg_torchrl.training.builders import build_agent, build_env

pytestmark = pytest.mark.skipif(not IS_BUILT, reason="nothing was built in C++ here")
CORES = {"lru": build_lru, "lstm": build_lstm, "gru": build_gru}


def agent_of(memory: str = "lru", observed: int = 6, width: int = 16, actions: int = 4, **options) -> PPOAgent:
    """Build an agent with parameters that are all random."""
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
            nn.init.normal_(parameter, std=0.5)
    return agent


def networks_of(agent: PPOAgent) -> Networks:
    return Networks(agent.encoder, agent.backbone, agent.fusion, agent.policy_head, agent.value_head)


def compiled(agent: PPOAgent, num_envs: int = 3) -> CompiledStep | None:
    backbone = BackboneStep(agent.backbone)
    with torch.no_grad():
        backbone.begin(num_envs)
        return compile_step(networks_of(agent), backbone, num_envs)


def entries_of(agent: PPOAgent, batch: int = 3, dtype: torch.dtype = torch.float32) -> dict:
    """Return observations and states that are not contiguous in memory."""
    observed, width = agent.encoder.module.last.in_features, agent.backbone.core.out_features
    entries = {"observation": torch.randn(observed, batch, dtype=dtype).t(), "is_init": torch.zeros(batch, 1).bool()}
    for key in agent.backbone.state_keys.values():
        entries[key] = torch.randn(batch, 1, 2 * width, dtype=dtype)[..., ::2]
    return entries


def reference(agent: PPOAgent, entries: dict) -> tuple[Tensor, Tensor, dict]:
    """Compute the same from the equations, in double precision."""
    agent = copy.deepcopy(agent).double()
    x = entries["observation"].double()
    state = {name: entries[key].double().squeeze(1) for name, key in agent.backbone.state_keys.items()}
    layer, fusion = agent.backbone.core.layers[0], agent.fusion.module
    features = x @ agent.encoder.module.last.weight.t()
    if len(state) == 1:
        opening, gate = torch.sigmoid(layer.decay_gate(features)), torch.sigmoid(layer.input_gate(features))
        loss = torch.expm1(-2 * opening * F.softplus(layer.rate))
        after = {"hidden": (1 + loss) * state["hidden"] + (-loss * (2 + loss)).sqrt() * gate * layer.input(features)}
    else:
        cell = nn.LSTMCell(features.shape[1], layer.features).double()
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
def test_a_compiled_step_computes_the_equations(memory, sizes, dtype, tolerance, threads) -> None:
    observed, width, actions, batch = sizes
    agent = agent_of(memory, observed, width, actions, input_bias=width == 33).to(dtype)
    entries = entries_of(agent, batch, dtype)
    assert not entries["observation"].is_contiguous() or 1 in (observed, batch)
    policy, value, after = reference(agent, entries)
    step, before = compiled(agent, batch), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step(entries)
    finally:
        torch.set_num_threads(before)
    found = {"logits": policy, "state_value": value}
    found |= {("next", "memory_state", name): expected.unsqueeze(1) for name, expected in after.items()}
    for key, expected in found.items():
        assert entries[key].dtype is dtype
        torch.testing.assert_close(entries[key].double(), expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_episodes_begin_from_the_initial_state() -> None:
    agent = agent_of(learn_initial_state=True)
    entries = entries_of(agent)
    entries["is_init"][1] = True
    expected = {**entries, ("memory_state", "hidden"): entries["memory_state", "hidden"].clone()}
    expected["memory_state", "hidden"][1] = agent.backbone.core.initial_state(1)["hidden"][0]
    expected["is_init"] = torch.zeros(3, 1).bool()
    entries["memory_state", "hidden"][1] = torch.nan  # forgotten, whatever it was
    step = compiled(agent)
    for each in (entries, expected):
        step(each)
    for key in ("logits", "state_value", ("next", "memory_state", "hidden")):
        assert torch.equal(entries[key], expected[key])


class MyLinear(nn.Linear):
    """A head of another kind."""


def _hooked(get) -> object:
    return lambda agent: get(agent).register_forward_hook(lambda *_: None)


def _shadowed(agent: PPOAgent) -> None:
    agent.fusion.module.forward = type(agent.fusion.module).forward.__get__(agent.fusion.module)


def _replaced(agent: PPOAgent) -> None:
    agent.policy_head.module = MyLinear(16, 4)


def _rewired(agent: PPOAgent) -> None:
    agent.fusion = TensorDictModule(agent.fusion.module, ["features", "features"], ["joint_features"])


def _deeper(agent: PPOAgent) -> None:
    agent.encoder.module.network.append(nn.SiLU())


def _another_shape(agent: PPOAgent) -> None:
    agent.value_head.module.bias = nn.Parameter(torch.zeros(2))


def _without_bias(agent: PPOAgent) -> None:
    agent.value_head.module.bias = None


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
    "another forward": _shadowed,
    "a head of another kind": _replaced,
    "another order": _rewired,
    "a layer more": _deeper,
    "bfloat16": lambda agent: agent.to(torch.bfloat16),
    "two types": lambda agent: agent.value_head.double(),
    "another shape": _another_shape,
    "no bias": _without_bias,
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_networks_are_run_by_torch(other: str) -> None:
    assert compiled(agent_of()) is not None
    assert compiled(agent_of(**OTHERS[other])) is None


@pytest.mark.parametrize("change", CHANGES)
def test_changed_networks_are_run_by_torch(change: str) -> None:
    agent = agent_of()
    assert compiled(agent) is not None
    CHANGES[change](agent)
    assert compiled(agent) is None


@torch.no_grad()
def test_gradients_autocast_and_transforms_are_left_to_torch() -> None:
    agent = agent_of()
    found = []
    torch.func.vmap(lambda x: found.append(compiled(agent)) or x)(torch.zeros(2))
    with torch.autocast("cpu"):
        found.append(compiled(agent))
    with torch.enable_grad():
        found.append(compile_step(networks_of(agent), BackboneStep(agent.backbone), 3))
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    found.append(compiled(agent))
    everywhere.remove()
    assert found == [None] * 4
    assert compiled(agent) is not None


@pytest.mark.parametrize("wrong", ["observation", "state", "rows"])
@torch.no_grad()
def test_entries_of_another_size_are_refused(wrong: str) -> None:
    agent = agent_of()
    step, entries = compiled(agent), entries_of(agent, 4 if wrong == "rows" else 3)
    step.backbone.may_begin = False
    if wrong == "observation":
        entries["observation"] = entries["observation"][:, 1:]
    if wrong == "state":
        entries["memory_state", "hidden"] = torch.zeros(3, 1, 15)
    with pytest.raises(ValueError, match=r"the compiled step needs torch.float32 \[3, .*; got torch.float32"):
        step(entries)


STEPS = 40


def collected(kind: type, memory: str, *, compiled_step: bool, monkeypatch) -> tuple[object, Tensor, int]:
    """Return two rollouts side by side, the state of the random numbers after them, and the number of C++ calls."""
    torch.manual_seed(0)
    cfg = load_config(overrides=["env=delayed_cue", "env.horizon=5", f"backbone={memory}", "env.num_envs=3"])
    env = build_env(cfg)
    agent = build_agent(cfg, env)
    more = {"value_operator": agent.get_value_operator()} if kind is RolloutCollector else {}
    made = kind(env, agent, frames_per_batch=3 * STEPS, total_frames=6 * STEPS, compiled_step=compiled_step, **more)
    made.set_seed(3)
    torch.manual_seed(5)
    calls: list[CompiledStep] = []
    run = CompiledStep.__call__
    monkeypatch.setattr(CompiledStep, "__call__", lambda self, entries: calls.append(self) or run(self, entries))
    batches = [batch.steps if kind is RolloutCollector else batch.clone() for batch in made]
    monkeypatch.undo()
    return torch.cat(batches, 1), torch.get_rng_state(), len(calls)


@pytest.mark.parametrize("kind", [FusedCollector, RolloutCollector])
@pytest.mark.parametrize("memory", ["lru", "lstm"])
def test_rollouts_with_and_without_a_compiled_step_agree(memory: str, kind: type, monkeypatch) -> None:
    theirs, random_state, calls = collected(kind, memory, compiled_step=False, monkeypatch=monkeypatch)
    assert calls == 0
    ours, random_state_too, calls = collected(kind, memory, compiled_step=True, monkeypatch=monkeypatch)
    assert calls == 2 * STEPS
    assert torch.equal(random_state, random_state_too)
    assert {str(key) for key in ours.keys(True, True)} == {str(key) for key in theirs.keys(True, True)}
    for key in theirs.keys(True, True):
        if theirs[key].is_floating_point():
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-6, msg=str(key))
        else:
            assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("memory", ["lru", "lstm"])
def test_a_hook_has_its_effect_from_the_next_rollout_on(memory: str) -> None:
    cfg = load_config(overrides=["env=delayed_cue", "env.horizon=5", f"backbone={memory}", "env.num_envs=3"])
    env = build_env(cfg)
    agent = build_agent(cfg, env)
    made = iter(FusedCollector(env, agent, frames_per_batch=3 * STEPS, total_frames=6 * STEPS))
    assert next(made)["state_value"].std() > 0
    agent.fusion.module.register_forward_hook(lambda module, inputs, joint: 0 * joint)
    assert torch.equal(next(made)["state_value"], agent.value_head.module.bias.detach().expand(3, STEPS, 1))
