"""The TensorDict wrapper of a core."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.envs import TransformedEnv
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl.cores import Core, MemorylessCore, build_gru, build_lstm, unroll
from cyborg_torchrl.modules import Backbone

FEATURES = 4


def inputs(*batch: int, dtype: torch.dtype = torch.float32, **entries: object) -> TensorDict:
    features = torch.randn(*batch, FEATURES, dtype=dtype)
    return TensorDict({"features": features, "is_init": torch.zeros(*batch, 1, dtype=torch.bool), **entries}, batch)


def reached(core: Core, *batch: int) -> TensorDict:
    like = next(core.parameters())
    shapes = core.state_shapes.items()
    return TensorDict({name: torch.randn(*batch, *shape, dtype=like.dtype) for name, shape in shapes}, batch)


def test_keys() -> None:
    backbone = Backbone(build_lstm(FEATURES))
    states = [("memory_state", "hidden"), ("memory_state", "cell")]
    assert backbone.in_keys == ["features", "is_init", *states]
    assert backbone.out_keys == ["memory_features", *(("next", *key) for key in states)]


def test_a_step_writes_features_and_next_state_and_nothing_else(build_core: Callable[..., Core]) -> None:
    core = build_core(FEATURES)
    td = inputs(5, memory_state=reached(core, 5))
    td["is_init"][2] = True
    before = td.clone()
    out = Backbone(core)(td)
    assert out is td
    assert (td.exclude("memory_features", "next") == before).all()
    state = {name: value.clone() for name, value in before["memory_state"].items()}
    for name, value in core.initial_state(1).items():
        state[name][2] = value[0]
    y, following = core.step(before["features"], state)
    assert torch.equal(td["memory_features"], y)
    assert td["next", "memory_state"].keys() == following.keys()
    assert all(torch.equal(td["next", "memory_state", name], value) for name, value in following.items())


def test_a_sequence_starts_from_the_state_of_its_first_step(build_core: Callable[..., Core]) -> None:
    core = build_core(FEATURES).double()
    td = inputs(3, 7, dtype=torch.float64, memory_state=reached(core, 3, 7))
    td["is_init"][0, 4] = td["is_init"][1, 0] = True
    backbone = Backbone(core)
    with set_recurrent_mode(True):
        last = backbone.run(td)
    first = {name: value[:, 0] for name, value in td["memory_state"].items()}
    y, expected = unroll(core, td["features"], first, td["is_init"].squeeze(-1))
    torch.testing.assert_close(td["memory_features"], y, rtol=0, atol=1e-12)
    for name, value in expected.items():
        torch.testing.assert_close(last[name], value, rtol=0, atol=1e-12)


def test_any_number_of_batch_dimensions(build_core: Callable[..., Core]) -> None:
    core = build_core(FEATURES).double()
    backbone = Backbone(core)
    td = inputs(2, 3, 7, dtype=torch.float64, memory_state=reached(core, 2, 3, 7))
    td["is_init"] = torch.rand(2, 3, 7, 1) < 0.2
    flat = td.reshape(6, 7)
    with set_recurrent_mode(True):
        last, flat_last = backbone.run(td), backbone.run(flat)
    torch.testing.assert_close(td["memory_features"].flatten(0, 1), flat["memory_features"])
    for name, value in last.items():
        torch.testing.assert_close(value.flatten(0, 1), flat_last[name])
    step, one = td[:, :, 0].clone(), td[0, 0, 0].clone()
    backbone(step)
    backbone(one)
    torch.testing.assert_close(step["memory_features"][0, 0], one["memory_features"])
    torch.testing.assert_close(step["memory_features"], td["memory_features"][:, :, 0])
    assert step["next", "memory_state"].batch_size[:2] == (2, 3)


def test_nested_keys_and_two_memories_side_by_side() -> None:
    first = Backbone(build_gru(FEATURES, hidden_size=6), ("a", "x"), ("a", "y"), ("a", "state"), ("a", "starts"))
    second = Backbone(build_gru(6, hidden_size=5), ("a", "y"), "out", "other", ("a", "starts"))
    flag = torch.zeros(2, 1, dtype=torch.bool)
    a = {"x": torch.randn(2, FEATURES), "starts": flag, "state": {"hidden": torch.randn(2, 1, 6)}}
    td = TensorDict({"a": a, "other": {"hidden": torch.randn(2, 1, 5)}}, [2])
    td = TensorDictSequential(first, second)(td)
    assert td["next", "a", "state", "hidden"].shape == (2, 1, 6)
    assert td["next", "other", "hidden"].shape == (2, 1, 5)
    y, _ = first.core.step(td["a", "x"], dict(td["a", "state"].items()))
    out, _ = second.core.step(y, dict(td["other"].items()))
    assert torch.equal(td["out"], out)


def test_a_missing_state_warns_in_the_middle_of_an_episode() -> None:
    backbone = Backbone(build_gru(FEATURES))
    td = inputs(3)
    td["is_init"][0] = True
    with pytest.warns(UserWarning, match=r"memory starts afresh.*make_tensordict_primer"):
        out = backbone(td.copy())
    with set_recurrent_mode(True), pytest.warns(UserWarning, match="memory starts afresh"):
        backbone(inputs(2, 3))
    y, _ = backbone.core.step(td["features"], backbone.core.initial_state(3))
    assert torch.equal(out["memory_features"], y)


def test_a_missing_state_is_no_matter_at_the_first_step() -> None:
    backbone = Backbone(build_gru(FEATURES))
    td = inputs(3)
    td["is_init"].fill_(True)
    sequence = inputs(3, 4)
    sequence["is_init"][:, 0] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone(td)
        with set_recurrent_mode(True):
            backbone(sequence)


def test_an_environment_without_primer_warns(make_env: Callable, make_agent: Callable) -> None:
    agent = make_agent(build_gru(FEATURES))
    with pytest.warns(UserWarning, match="auto_register_policy_transforms=True"):
        make_env(2, p_terminated=0.0, p_truncated=0.0).rollout(5, agent)


def test_missing_is_init_names_the_cure(make_env: Callable, make_agent: Callable) -> None:
    backbone = Backbone(build_gru(FEATURES))
    with pytest.raises(KeyError, match=r"add torchrl.envs.InitTracker\(\) to the environment"):
        backbone(inputs(2).exclude("is_init"))
    env = TransformedEnv(make_env(2).base_env)
    with pytest.raises(KeyError, match="InitTracker"):
        env.rollout(3, make_agent(build_gru(FEATURES)))


def test_missing_or_wrong_features_are_named() -> None:
    backbone = Backbone(build_gru(FEATURES))
    with pytest.raises(KeyError, match="'features', which is not in the tensordict"):
        backbone(inputs(2).exclude("features"))
    td = inputs(2)
    td["features"] = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="'features' has 5 features; the core was built for 4"):
        backbone(td)


def test_primer_puts_zeros_at_reset_alone(build_core: Callable[..., Core], make_env: Callable) -> None:
    core = build_core(FEATURES)
    env = make_env(3, p_terminated=0.0, p_truncated=0.0)
    env.append_transform(Backbone(core).make_tensordict_primer())
    td = env.reset()
    assert td["memory_state"].keys() == core.state_shapes.keys()
    for name, shape in core.state_shapes.items():
        assert td["memory_state", name].shape == (3, *shape)
        assert (td["memory_state", name] == 0).all()
        assert env.full_state_spec["memory_state", name].shape == (3, *shape)
    for value in td["memory_state"].values():
        value.fill_(7.0)
    td["_reset"] = torch.tensor([[False], [True], [False]])
    td = env.reset(td)
    for value in td["memory_state"].values():
        assert (value[[0, 2]] == 7.0).all()
        assert (value[1] == 0.0).all()


def test_primer_follows_the_dtype_and_memoryless_cores_have_nothing_to_prime(make_env: Callable) -> None:
    env = make_env(2)
    env.append_transform(Backbone(build_gru(FEATURES)).double().make_tensordict_primer())
    assert env.reset()["memory_state", "hidden"].dtype == torch.float64
    env = make_env(2)
    env.append_transform(Backbone(MemorylessCore(build_gru(FEATURES))).make_tensordict_primer())
    assert "memory_state" not in env.reset().keys()


def test_copies_pickles_and_swapped_parameters(build_core: Callable[..., Core]) -> None:
    backbone = Backbone(build_core(FEATURES))
    td = inputs(2, 5, memory_state=reached(backbone.core, 2, 5))

    def run(module: Callable) -> torch.Tensor:
        with set_recurrent_mode(True):
            return module(td.copy())["memory_features"]

    y = run(backbone)
    for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert torch.equal(run(twin), y)
    parameters = TensorDict.from_module(backbone)
    zeros = parameters.data.apply(torch.zeros_like)
    with zeros.to_module(backbone, preserve_module_state=False):
        assert not torch.equal(run(backbone), y)
    assert torch.equal(run(backbone), y)


def test_stacks_with_other_modules() -> None:
    embed = TensorDictModule(torch.nn.Linear(3, FEATURES), in_keys=["observation"], out_keys=["features"])
    backbone = Backbone(build_gru(FEATURES, hidden_size=6))
    head = TensorDictModule(torch.nn.Linear(6, 2), in_keys=["memory_features"], out_keys=["out"])
    stack = TensorDictSequential(embed, backbone, head)
    td = inputs(4, memory_state=reached(backbone.core, 4)).exclude("features")
    td["observation"] = torch.randn(4, 3)
    y, state = backbone.core.step(embed.module(td["observation"]), dict(td["memory_state"].items()))
    out = stack(td)
    assert torch.equal(out["out"], head.module(y))
    assert torch.equal(out["next", "memory_state", "hidden"], state["hidden"])
