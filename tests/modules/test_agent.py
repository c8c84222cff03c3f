"""The agent as a policy and as an evaluator of sequences."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, MultiCategorical, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl.cores import Core, InitialState, MemorylessCore, build_gru
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder

BATCH, STEPS = 3, 9
ACTION_SPECS = {
    "categorical": Categorical(3),
    "multi": MultiCategorical([3, 2]),
    "continuous": Bounded(-1.0, 2.0, (2,)),
}


@pytest.fixture
def agent(build_gru_case: Callable[..., Core], make_agent: Callable) -> PPOAgent:
    return make_agent(build_gru_case(5))


def sequence(agent: PPOAgent) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    obs, actions = torch.randn(BATCH, STEPS, 3), torch.randint(3, (BATCH, STEPS))
    state = {name: torch.randn(BATCH, *shape) for name, shape in agent.backbone.core.state_shapes.items()}
    is_init = torch.zeros(BATCH, STEPS, dtype=torch.bool)
    is_init[1, 4] = is_init[2, 0] = True
    return obs, actions, state, is_init


def step_input(agent: PPOAgent, batch: int = BATCH) -> TensorDict:
    core = agent.backbone.core
    state = {name: torch.randn(batch, *shape) for name, shape in core.state_shapes.items()}
    is_init = torch.zeros(batch, 1, dtype=torch.bool)
    return TensorDict({"observation": torch.randn(batch, 3), "is_init": is_init, "memory_state": state}, [batch])


@pytest.mark.parametrize("spec", ACTION_SPECS.values(), ids=ACTION_SPECS)
def test_evaluation_equals_acting(
    build_core: Callable[..., Core], make_agent: Callable, spec: Categorical | MultiCategorical | Bounded
) -> None:
    agent = make_agent(build_core(5), spec)
    obs = torch.randn(BATCH, STEPS, 3)
    is_init = torch.rand(BATCH, STEPS, 1) < 0.2
    td = step_input(agent)
    start = {name: value.clone() for name, value in td["memory_state"].items()}
    acted = []
    with torch.no_grad():
        for t in range(STEPS):
            td.update({"observation": obs[:, t], "is_init": is_init[:, t]})
            acted.append(agent(td.copy()))
            td["memory_state"] = acted[-1]["next", "memory_state"]
        rollout = torch.stack(acted, 1)
        evaluation = agent.evaluate_actions(obs, rollout["action"], start, is_init)
    assert evaluation.log_prob.shape == evaluation.entropy.shape == evaluation.value.shape == (BATCH, STEPS)
    torch.testing.assert_close(evaluation.log_prob, rollout["action_log_prob"], rtol=0, atol=3e-5)
    torch.testing.assert_close(evaluation.value, rollout["state_value"].squeeze(-1), rtol=1e-5, atol=3e-5)
    for name, value in evaluation.state.items():
        torch.testing.assert_close(value, rollout["next", "memory_state", name][:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_deterministic", [True, False])
def test_steps_by_hand_equal_the_sequence(build_core: Callable[..., Core], make_agent, is_deterministic: bool) -> None:
    agent = make_agent(build_core(5))
    obs, state, steps = torch.randn(BATCH, STEPS, 3), None, []
    for t in range(STEPS):
        steps.append(agent.act(obs[:, t], state, is_deterministic=is_deterministic))
        state = steps[-1].state
    actions = torch.stack([step.action for step in steps], 1)
    whole = agent.evaluate_actions(obs, actions)
    torch.testing.assert_close(torch.stack([step.value for step in steps], 1), whole.value, rtol=1e-4, atol=1e-5)
    for name, value in whole.state.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
    others = [agent.evaluate_actions(obs, torch.full_like(actions, action)).log_prob for action in range(3)]
    is_greedy = (whole.log_prob >= torch.stack(others).amax(0) - 1e-5).all()
    assert bool(is_greedy) is is_deterministic


def test_no_state_means_the_initial_state(build_core: Callable[..., Core], make_agent: Callable) -> None:
    agent = make_agent(build_core(5)).double()
    obs, actions, state, is_init = sequence(agent)
    begun = is_init.clone()
    begun[:, 0] = True
    given = agent.evaluate_actions(obs.double(), actions, state, begun)
    for flags in (is_init, begun):
        without = agent.evaluate_actions(obs.double(), actions, None, flags)
        torch.testing.assert_close(without.log_prob, given.log_prob)
        torch.testing.assert_close(without.value, given.value)
    quiet = agent.evaluate_actions(obs.double(), actions)
    initial = agent.backbone.core.initial_state(BATCH)
    torch.testing.assert_close(quiet.value, agent.evaluate_actions(obs.double(), actions, initial).value)
    learned = [
        parameter for module in agent.modules() if isinstance(module, InitialState) for parameter in module.parameters()
    ]
    assert bool(learned) == any(value.requires_grad for value in initial.values())
    for grad in torch.autograd.grad(quiet.value.square().sum(), learned) if learned else ():
        assert grad.abs().sum() > 0


def test_flags_may_have_a_last_dimension_and_states_may_be_a_tensordict(agent: PPOAgent) -> None:
    obs, actions, state, is_init = sequence(agent)
    expected = agent.evaluate_actions(obs, actions, state, is_init)
    others = [
        agent.evaluate_actions(obs, actions, state, is_init.unsqueeze(-1)),
        agent.evaluate_actions(obs, actions, TensorDict(state, [BATCH]), is_init),
        agent.evaluate_actions(TensorDict({"observation": obs}, [BATCH, STEPS]), actions, state, is_init),
    ]
    for other in others:
        assert torch.equal(other.log_prob, expected.log_prob)
        assert torch.equal(other.value, expected.value)


def test_evaluation_can_be_split_anywhere(agent: PPOAgent) -> None:
    agent = agent.double()
    obs, actions, state, is_init = sequence(agent)
    obs, state = obs.double(), {name: value.double() for name, value in state.items()}
    whole = agent.evaluate_actions(obs, actions, state, is_init)
    for split in (1, 4, 5, STEPS - 1):
        first = agent.evaluate_actions(obs[:, :split], actions[:, :split], state, is_init[:, :split])
        second = agent.evaluate_actions(obs[:, split:], actions[:, split:], first.state, is_init[:, split:])
        torch.testing.assert_close(torch.cat([first.log_prob, second.log_prob], 1), whole.log_prob)
        for name, value in second.state.items():
            torch.testing.assert_close(value, whole.state[name])


def test_evaluation_leaves_its_arguments_and_the_recurrent_mode_alone(agent: PPOAgent) -> None:
    obs, actions, state, is_init = sequence(agent)
    td = TensorDict({"observation": obs}, [BATCH, STEPS])
    kept = copy.deepcopy((state, is_init))
    agent.evaluate_actions(td, actions, state, is_init)
    assert set(td.keys(True)) == {"observation"}
    assert torch.equal(is_init, kept[1])
    assert all(torch.equal(state[name], value) for name, value in kept[0].items())
    assert agent(step_input(agent))["action"].shape == (BATCH,), "the agent steps again"


@pytest.mark.parametrize(
    ("obs", "actions", "is_init"),
    [((3, 9), (3, 8), (3, 9)), ((3, 9), (3, 9), (3, 8)), ((2, 9), (3, 9), (3, 9)), ((9, 3), (3, 9), (3, 9))],
)
def test_disagreeing_shapes_are_refused(agent: PPOAgent, obs: tuple, actions: tuple, is_init: tuple) -> None:
    flags = torch.zeros(is_init, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"must begin with the same \[B, T\]"):
        agent.evaluate_actions(torch.zeros(*obs, 3), torch.zeros(actions, dtype=torch.long), None, flags)


WRONG_STATES = {
    "one_row": lambda value: value[:1],
    "one_layer": lambda value: value[:, :1],
    "no_layers": lambda value: value[:, 0],
    "layers_first": lambda value: value.transpose(0, 1),
}


@pytest.mark.parametrize("batch", [1, 2, 3, 9])
@pytest.mark.parametrize("spoil", WRONG_STATES.values(), ids=WRONG_STATES)
def test_states_of_another_shape_are_refused(agent: PPOAgent, spoil: Callable, batch: int) -> None:
    """Whatever the batch, the number of layers (2) and the length (9) happen to be."""
    obs, actions = torch.randn(batch, STEPS, 3), torch.randint(3, (batch, STEPS))
    state = {name: torch.randn(batch, *shape) for name, shape in agent.backbone.core.state_shapes.items()}
    wrong = {name: spoil(value) for name, value in state.items()}
    if all(wrong[name].shape == value.shape for name, value in state.items()):
        pytest.skip("this is the right shape")
    with pytest.raises((ValueError, RuntimeError)):
        agent.evaluate_actions(obs, actions, wrong)


def test_states_with_other_names_are_refused(agent: PPOAgent) -> None:
    obs, actions, state, _ = sequence(agent)
    with pytest.raises((KeyError, ValueError), match="hidden"):
        agent.evaluate_actions(obs, actions, {"recurrent": state["hidden"]})


def two_key_agent() -> PPOAgent:
    spec = Composite(left=Unbounded((2,)), right=Unbounded((3,)))
    encoder = build_encoder(spec, batch_dims=0, features=6, observation_keys=["left", "right"])
    return PPOAgent(encoder, Backbone(build_gru(6, hidden_size=8)), Categorical(4))


def test_several_observations_come_as_a_tensordict() -> None:
    agent = two_key_agent()
    td = TensorDict({"left": torch.randn(2, 5, 2), "right": torch.randn(2, 5, 3)}, [2, 5])
    actions = torch.randint(4, (2, 5))
    assert agent.evaluate_actions(td, actions).value.shape == (2, 5)
    with pytest.raises(ValueError, match=r"\['left', 'right'\]: pass obs as a tensordict"):
        agent.evaluate_actions(torch.randn(2, 5, 5), actions)


def test_what_acting_writes(agent: PPOAgent) -> None:
    td = step_input(agent)
    read = set(td.keys(True, True))
    out = agent(td)
    assert out is td
    written = set(td.keys(True, True)) - read
    assert written == {"action", "action_log_prob", "logits", "state_value", ("next", "memory_state", "hidden")}
    assert set(agent.out_keys) == written
    assert {"observation", "is_init", ("memory_state", "hidden")} == set(agent.in_keys)
    dist = torch.distributions.Categorical(logits=td["logits"])
    torch.testing.assert_close(dist.log_prob(td["action"]), td["action_log_prob"])


def test_exploration_types(agent: PPOAgent) -> None:
    td = step_input(agent, 1000)
    for value in td["memory_state"].values():
        value[:] = value[:1].clone()
    td["observation"][:] = td["observation"][:1].clone()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        greedy = agent(td.copy())
    assert (greedy["action"] == greedy["logits"].argmax(-1)).all()
    drawn = agent(td.copy())
    shares = torch.bincount(drawn["action"], minlength=3) / 1000
    torch.testing.assert_close(shares, drawn["logits"][0].softmax(-1), rtol=0, atol=0.06)


def test_operators_agree_with_the_agent_and_share_its_parameters(agent: PPOAgent) -> None:
    actor, critic, head = agent.get_policy_operator(), agent.get_value_operator(), agent.get_value_head()
    own = {id(p) for p in agent.parameters()}
    assert {id(p) for module in (actor, critic, head) for p in module.parameters()} == own
    td = step_input(agent)
    out = agent(td.copy())
    torch.testing.assert_close(actor.get_dist(td.copy()).logits, torch.log_softmax(out["logits"], -1))
    torch.testing.assert_close(agent.get_dist(td.copy()).logits, torch.log_softmax(out["logits"], -1))
    torch.testing.assert_close(critic(td.copy())["state_value"], out["state_value"])
    after_actor = actor(td.copy())
    torch.testing.assert_close(head(after_actor)["state_value"], out["state_value"])
    torch.testing.assert_close(after_actor["next", "memory_state"], out["next", "memory_state"])


def test_get_dist_over_sequences(agent: PPOAgent) -> None:
    obs, actions, state, is_init = sequence(agent)
    expected = agent.evaluate_actions(obs, actions, state, is_init)
    td = TensorDict({"observation": obs, "is_init": is_init.unsqueeze(-1)}, [BATCH, STEPS])
    stored = {name: value.unsqueeze(1).expand(-1, STEPS, -1, -1) for name, value in state.items()}
    td["memory_state"] = TensorDict(stored, [BATCH, STEPS])
    with set_recurrent_mode(True):
        log_prob = agent.get_dist(td).log_prob(actions)
    torch.testing.assert_close(log_prob, expected.log_prob)
    torch.testing.assert_close(agent.get_value_head()(td)["state_value"].squeeze(-1), expected.value)


def test_copies_and_pickles(build_core: Callable[..., Core], make_agent: Callable) -> None:
    agent = make_agent(build_core(5))
    obs, actions, state, is_init = sequence(agent)
    expected = agent.evaluate_actions(obs, actions, state, is_init)
    for twin in (copy.deepcopy(agent), pickle.loads(pickle.dumps(agent))):
        assert torch.equal(twin.evaluate_actions(obs, actions, state, is_init).log_prob, expected.log_prob)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(agent.evaluate_actions(obs, actions, state, is_init).log_prob, expected.log_prob)
    other = make_agent(build_core(5))
    other.load_state_dict(agent.state_dict())
    assert torch.equal(other.evaluate_actions(obs, actions, state, is_init).log_prob, expected.log_prob)


def test_the_first_policy_is_near_uniform_and_the_first_value_near_zero() -> None:
    encoder = build_encoder(Composite(observation=Unbounded((3,))), batch_dims=0)
    agent = PPOAgent(encoder, Backbone(build_gru(64)), Categorical(4))
    evaluation = agent.evaluate_actions(torch.randn(8, 20, 3), torch.randint(4, (8, 20)))
    assert (evaluation.log_prob + torch.tensor(4.0).log()).abs().max() < 0.05
    assert evaluation.value.abs().max() < 0.5


def test_a_memoryless_agent_has_no_state(make_agent: Callable) -> None:
    agent = make_agent(MemorylessCore(build_gru(5, hidden_size=8)))
    td = TensorDict({"observation": torch.randn(3, 3), "is_init": torch.zeros(3, 1, dtype=torch.bool)}, [3])
    out: TensorDictBase = agent(td)
    assert "next" not in out.keys()
    evaluation = agent.evaluate_actions(td["observation"].unsqueeze(1), out["action"].unsqueeze(1))
    assert evaluation.state == {}
    torch.testing.assert_close(evaluation.log_prob.squeeze(1), out["action_log_prob"])
