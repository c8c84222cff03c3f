"""Action heads: every kind of action spec, against torch's own distributions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import distributions
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    TensorSpec,
    Unbounded,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type

from cyborg_torchrl.cores import build_gru
from cyborg_torchrl.modules import MultiDiscrete, NormalHead, PPOAgent, build_action_head

WIDTH = 6
SPECS = {
    "categorical": Categorical(4),
    "one_hot": OneHot(4),
    "multi_categorical": MultiCategorical([3, 2, 4]),
    "bounded": Bounded(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 10.0])),
    "unbounded": Unbounded((2,)),
}


def step_input(batch: int) -> TensorDict:
    is_init = torch.ones(batch, 1, dtype=torch.bool)
    return TensorDict({"observation": torch.randn(batch, 3), "is_init": is_init}, [batch])


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_agents_act_in_every_spec(make_agent: Callable, spec: TensorSpec, batch_dims: int) -> None:
    batched = spec.expand(5, *spec.shape) if batch_dims else spec
    agent: PPOAgent = make_agent(build_gru(4, hidden_size=8), batched, batch_dims=batch_dims)
    for kind in (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC):
        with set_exploration_type(kind):
            out = agent(step_input(5))
        assert out["action"].shape == (5, *spec.shape)
        assert out["action"].dtype.is_floating_point == spec.dtype.is_floating_point
        assert out["action"].isfinite().all()
        assert out["action_log_prob"].shape == (5,)
        assert out["action_log_prob"].isfinite().all()
        if not spec.dtype.is_floating_point:
            assert spec.expand(5, *spec.shape).is_in(out["action"].to(spec.dtype))
    actions = out["action"].unsqueeze(1)
    evaluation = agent.evaluate_actions(out["observation"].unsqueeze(1), actions)
    torch.testing.assert_close(evaluation.log_prob.squeeze(1), out["action_log_prob"])
    assert evaluation.entropy.shape == (5, 1)
    assert evaluation.entropy.isfinite().all()


def test_the_greedy_action_is_the_likeliest(make_agent: Callable) -> None:
    for name, spec in SPECS.items():
        agent = make_agent(build_gru(4, hidden_size=8), spec)
        td = step_input(50)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            greedy = agent(td.copy())
        for _ in range(5):
            drawn = agent(td.copy())
            assert (drawn["action_log_prob"] <= greedy["action_log_prob"] + 1e-6).all(), name


def test_multi_discrete_equals_its_choices() -> None:
    logits = torch.randn(7, 5, 9, requires_grad=True)
    dist = MultiDiscrete(logits, [3, 2, 4])
    parts = [distributions.Categorical(logits=part) for part in logits.split([3, 2, 4], -1)]
    sample = dist.sample()
    assert sample.shape == (7, 5, 3)
    log_prob = sum(part.log_prob(sample[..., i]) for i, part in enumerate(parts))
    torch.testing.assert_close(dist.log_prob(sample), log_prob)
    torch.testing.assert_close(dist.entropy(), sum(part.entropy() for part in parts))
    assert torch.equal(dist.mode, torch.stack([part.probs.argmax(-1) for part in parts], -1))
    assert dist.batch_shape == (7, 5)
    assert dist.event_shape == (3,)
    many = MultiDiscrete(logits[0, 0].detach(), [3, 2, 4]).sample((20_000,))
    assert many.shape == (20_000, 3)
    for i, part in enumerate(parts):
        shares = torch.bincount(many[:, i], minlength=part.probs.shape[-1]) / 20_000
        torch.testing.assert_close(shares, part.probs[0, 0].detach(), rtol=0, atol=0.02)


def test_normal_head_works_in_units_of_half_the_range() -> None:
    head = NormalHead(WIDTH, torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 10.0]))
    features = torch.randn(4, 5, WIDTH)
    loc, scale = head(features)
    expected = torch.tensor([0.0, 5.0]) + torch.tensor([1.0, 5.0]) * head.mean(features)
    torch.testing.assert_close(loc, expected)
    torch.testing.assert_close(scale, torch.tensor([1.0, 5.0]).expand(4, 5, 2))


@pytest.mark.parametrize(
    "spec",
    [Unbounded((3,)), Bounded(torch.tensor([0.0] * 3), torch.tensor([float("inf")] * 3)), Unbounded((5, 3))],
    ids=["unbounded", "half", "batched"],
)
def test_without_bounds_the_head_is_plain(spec: TensorSpec) -> None:
    head = build_action_head(spec, WIDTH, batch_dims=len(spec.shape) - 1)
    loc, scale = head.network(torch.randn(4, WIDTH))
    assert loc.shape == (4, 3)
    assert loc.abs().max() < 1.0
    assert torch.equal(scale, torch.ones(4, 3))


def test_continuous_log_prob_is_a_normals() -> None:
    head = build_action_head(SPECS["bounded"], WIDTH)
    loc, scale = head.network(torch.randn(4, WIDTH))
    dist = head.distribution_class(loc, scale, **head.distribution_kwargs)
    action = torch.randn(4, 2)
    torch.testing.assert_close(dist.log_prob(action), distributions.Normal(loc, scale).log_prob(action).sum(-1))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_scale_shrinks_the_weights_and_the_bias_starts_at_zero(spec: TensorSpec) -> None:
    torch.manual_seed(1)
    wide = build_action_head(spec, WIDTH, scale=1.0)
    torch.manual_seed(1)
    narrow = build_action_head(spec, WIDTH, scale=0.01)
    features = torch.randn(10, WIDTH)
    outputs = [head.network(features) for head in (wide, narrow)]
    first, second = (out[0] if isinstance(out, tuple) else out for out in outputs)
    centre = wide.network.centre if isinstance(wide.network, NormalHead) else 0.0
    torch.testing.assert_close(0.01 * (first - centre), second - centre, rtol=1e-3, atol=1e-6)


def test_choices_of_equal_size() -> None:
    """TorchRL gives MultiDiscrete([3, 3, 3, 3]) of gymnasium the spec of a categorical with a shape."""
    head = build_action_head(Categorical(3, shape=(7, 4)), WIDTH, batch_dims=1)
    assert head.sizes == [3, 3, 3, 3]
    action = head.distribution_class(head.network(torch.randn(7, WIDTH)), **head.distribution_kwargs).sample()
    assert Categorical(3, shape=(7, 4)).is_in(action)


@pytest.mark.parametrize(
    "spec",
    [
        Bounded(-1.0, 1.0, ()),
        Bounded(-1.0, 1.0, (2, 2)),
        Unbounded((2, 2)),
        Composite(move=Categorical(2)),
        MultiOneHot([2, 3]),
        Binary(3),
        Categorical(3, shape=(1,)),
        Bounded(0, 3, (2,), dtype=torch.int64),
    ],
    ids=["scalar", "matrix", "free_matrix", "composite", "multi_one_hot", "binary", "one_categorical", "integers"],
)
def test_other_actions_are_refused_when_the_head_is_built(spec: TensorSpec) -> None:
    with pytest.raises(ValueError, match=rf"no action head fits {type(spec).__name__} .*flat continuous actions do"):
        build_action_head(spec, WIDTH)
