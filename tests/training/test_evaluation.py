"""Episodes are counted once each, and intervals are those of the textbooks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from cyborg_torchrl.config import load_config
from cyborg_torchrl.cores import build_gru
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.modules.nan_check import NonFiniteError
from cyborg_torchrl.training.builders import build_agent, build_env
from cyborg_torchrl.training.evaluation import evaluate


def test_every_environment_gives_its_first_episodes(make_env: Callable, make_agent: Callable) -> None:
    agent = make_agent(build_gru(3, hidden_size=8))
    env = make_env(5, 0)
    env.append_transform(agent.backbone.make_tensordict_primer())
    seen: list[tuple[int, int]] = []
    result = evaluate(agent, env, 12, on_episodes=lambda finished, total: seen.append((finished, total)))

    again = make_env(5, 0)
    again.append_transform(agent.backbone.make_tensordict_primer())
    tensordict = again.reset()
    sums, lengths, found = [0.0] * 5, [0] * 5, [[] for _ in range(5)]
    from torchrl.envs.utils import ExplorationType, set_exploration_type

    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        while min(map(len, found)) < 3:
            played, tensordict = again.step_and_maybe_reset(agent(tensordict))
            for i in range(5):
                sums[i] += float(played["next", "reward"][i])
                lengths[i] += 1
                if played["next", "done"][i]:
                    found[i].append((lengths[i], sums[i]))
                    sums[i], lengths[i] = 0.0, 0
    expected = sorted(pair for episodes in found for pair in episodes[:3])
    assert result.episodes == 15
    ours = sorted(zip(result.lengths.tolist(), result.returns.tolist(), strict=True))
    assert [length for length, _ in ours] == [length for length, _ in expected]
    assert [total for _, total in ours] == pytest.approx([total for _, total in expected], abs=1e-5)
    assert result.mean_reward == pytest.approx(sum(total for _, total in expected) / 15, abs=1e-5)
    assert result.success_rate is None
    assert seen[-1] == (15, 15)
    assert [finished for finished, _ in seen] == sorted(finished for finished, _ in seen)


class Opaque(TensorDictModuleBase):
    """An agent that the collectors cannot split into its networks."""

    def __init__(self, agent: PPOAgent) -> None:
        super().__init__()
        self.agent, self.in_keys, self.out_keys = agent, agent.in_keys, agent.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self.agent(tensordict)


@pytest.mark.parametrize("is_deterministic", [True, False])
@pytest.mark.parametrize("task", [["env=delayed_cue", "backbone=lru"], ["env=n_back", "backbone=gru"], ["env=tmaze"]])
def test_evaluation_on_tensors_has_the_results_of_torchrl(task: list[str], is_deterministic: bool) -> None:
    results = []
    for wrap in (lambda agent: agent, Opaque):
        torch.manual_seed(0)
        cfg = load_config(overrides=[*task, "env.horizon=6", "env.num_envs=5"])
        env = build_env(cfg)
        agent = build_agent(cfg, env)
        torch.nn.init.normal_(agent.policy_head.module.weight)
        env.append_transform(agent.backbone.make_tensordict_primer())
        env.set_seed(1)
        torch.manual_seed(2)
        results.append((evaluate(wrap(agent), env, 30, is_deterministic=is_deterministic), torch.get_rng_state()))
    (ours, random_state), (theirs, random_state_too) = results
    assert torch.equal(random_state, random_state_too)
    for name in ("returns", "lengths", "successes"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("is_deterministic", [True, False])
def test_an_agent_with_nan_is_refused(is_deterministic: bool) -> None:
    cfg = load_config(overrides=["env=delayed_cue", "env.horizon=6", "env.num_envs=5"])
    env = build_env(cfg)
    agent = build_agent(cfg, env)
    env.append_transform(agent.backbone.make_tensordict_primer())
    with torch.no_grad():
        agent.policy_head.module.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="'logits' is nan in environment 0"):
        evaluate(agent, env, 5, is_deterministic=is_deterministic)
