"""Invalid actions are never drawn, and the update computes with the same masks as acting."""

from __future__ import annotations

import warnings

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Binary, Categorical, Composite, MultiCategorical, OneHot, Unbounded
from torchrl.envs import ActionMask, EnvBase, InitTracker, TransformedEnv

from cyborg_torchrl import keys
from cyborg_torchrl.collectors import FusedCollector, RolloutCollector
from cyborg_torchrl.cores import build_gru
from cyborg_torchrl.data import RecurrentRolloutBuffer
from cyborg_torchrl.modules import Backbone, PPOAgent, build_encoder
from cyborg_torchrl.modules.action_heads import MASKED_LOGIT, NoValidActionError
from cyborg_torchrl.objectives import RecurrentClipPPOLoss, add_advantages

N, T, LENGTH = 8, 24, 6
SPECS = {
    "categorical": (lambda: Categorical(4, shape=[N]), [4]),
    "one_hot": (lambda: OneHot(4, shape=[N, 4]), [4]),
    "multi_discrete": (lambda: MultiCategorical([3, 2], shape=[N, 2]), [3, 2]),
}


class Masked(EnvBase):
    """Allows some options of each choice, drawn anew at each step, and counts the others that it gets."""

    def __init__(self, kind: str, num_valid: int = 1) -> None:
        super().__init__(batch_size=[N], device="cpu")
        make_spec, self.sizes = SPECS[kind]
        self.kind, self.num_valid, self.invalid, self.steps = kind, num_valid, 0, 0
        width = sum(self.sizes)
        self.observation_spec = Composite(
            observation=Unbounded((N, 3)), action_mask=Binary(width, (N, width), dtype=torch.bool), shape=[N]
        )
        self.action_spec = make_spec()
        self.reward_spec = Unbounded((N, 1))
        flag = Binary(1, (N, 1), dtype=torch.bool)
        self.done_spec = Composite(done=flag.clone(), terminated=flag.clone(), truncated=flag.clone(), shape=[N])
        self.time, self.generator = torch.zeros(N, dtype=torch.long), torch.Generator()

    def _set_seed(self, seed: int | None) -> None:
        self.generator.manual_seed(seed or 0)

    def _seen(self, done: torch.Tensor) -> TensorDict:
        parts = []
        for size in self.sizes:
            order = torch.rand(N, size, generator=self.generator).argsort(-1)
            num_valid = min(self.num_valid, size - 1)
            parts.append(torch.zeros(N, size, dtype=torch.bool).scatter_(1, order[:, :num_valid], True))
        self.mask = torch.cat(parts, -1)
        entries = {"observation": torch.randn(N, 3, generator=self.generator), "action_mask": self.mask.clone()}
        flags = {"done": done, "terminated": done.clone(), "truncated": torch.zeros_like(done)}
        return TensorDict(entries | flags, [N])

    def _reset(self, tensordict: TensorDict | None = None, **_: object) -> TensorDict:
        which = None if tensordict is None else tensordict.get("_reset", None)
        which = torch.ones(N, dtype=torch.bool) if which is None else which.reshape(N)
        self.time = self.time.masked_fill(which, 0)
        return self._seen(torch.zeros(N, 1, dtype=torch.bool))

    def _step(self, tensordict: TensorDict) -> TensorDict:
        action = tensordict["action"]
        chosen = {
            "categorical": lambda: torch.nn.functional.one_hot(action, 4),
            "one_hot": lambda: action,
            "multi_discrete": lambda: torch.cat(
                [torch.nn.functional.one_hot(a, n) for a, n in zip(action.unbind(-1), self.sizes, strict=True)], -1
            ),
        }[self.kind]()
        self.invalid += int((chosen.bool() & ~self.mask).any(-1).sum())
        self.steps += N
        self.time = self.time + 1
        seen = self._seen((self.time >= LENGTH).unsqueeze(-1))
        return seen.set("reward", torch.ones(N, 1))


def make(kind: str, num_valid: int = 2, *, has_action_mask: bool = False) -> tuple[Masked, TransformedEnv, PPOAgent]:
    torch.manual_seed(0)
    base = Masked(kind, num_valid)
    env = TransformedEnv(base, InitTracker())
    if has_action_mask:
        env.append_transform(ActionMask())
    encoder = build_encoder(env.observation_spec, batch_dims=1, features=8)
    backbone = Backbone(build_gru(8, hidden_size=8))
    agent = PPOAgent(
        encoder,
        backbone,
        base.action_spec,
        batch_dims=1,
        policy_scale=1.0,
        policy_hidden_sizes=[8],
        action_mask=keys.ACTION_MASK,
        mask_shape=[sum(base.sizes)],
    )
    return base, env, agent


def collectors(env: EnvBase, agent: PPOAgent, buffer: RecurrentRolloutBuffer, kind: str):
    frames = {"frames_per_batch": N * T, "total_frames": 4 * N * T}
    if kind in ("rollout", "plain"):
        options = {"value_operator": agent.get_value_operator(), "state_steps": buffer.state_steps}
        return RolloutCollector(env, agent, is_fused=kind == "rollout", **options, **frames)
    return {"torchrl": Collector, "fused": FusedCollector}[kind](
        env, agent, auto_register_policy_transforms=True, **frames
    )


def test_the_mask_is_not_an_observation():
    _, _, agent = make("categorical")
    assert agent.encoder.in_keys == ["observation"]
    assert agent.observed_keys == ["observation", "action_mask"]


@pytest.mark.parametrize("collector", ["rollout", "plain", "fused"])
def test_a_policy_that_does_not_read_the_mask_is_a_warning(collector):
    _, env, agent = make("categorical")
    unaware = PPOAgent(agent.encoder, agent.backbone, env.action_spec, batch_dims=1)
    buffer = RecurrentRolloutBuffer(N * T, 8, 6, num_envs=N)
    with pytest.warns(UserWarning, match="does not read the environment's entry 'action_mask'"):
        collectors(env, unaware, buffer, collector)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        collectors(env, agent, buffer, collector)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("collector", ["rollout", "plain", "torchrl", "fused"])
def test_no_invalid_action_and_the_same_ratio(kind, collector):
    base, env, agent = make(kind)
    loss = RecurrentClipPPOLoss(agent, entropy_coeff=0.01)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    buffer = RecurrentRolloutBuffer(N * T, 8, 6, num_envs=N, burn_in=2, state_keys=loss.state_keys)
    for rollout in collectors(env, agent, buffer, collector):
        add_advantages(rollout, agent.get_value_operator(), gamma=0.9, gae_lambda=0.95)
        buffer.store(rollout)
        first = True
        for batch in buffer:
            losses = loss(batch)
            assert not first or losses["ratio_error"] <= 1e-5
            assert all(bool(losses[name].isfinite()) for name in ("loss_objective", "loss_entropy", "kl_approx"))
            first = False
            optimizer.zero_grad()
            sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
            optimizer.step()
    assert base.steps == 4 * N * T
    assert base.invalid == 0


def test_entropy_is_that_of_the_valid_options():
    _, env, agent = make("categorical", num_valid=2)
    agent.policy_head.module.network[-1].weight.data.zero_()
    steps = env.reset()
    dist = agent.get_dist(steps.clone())
    torch.testing.assert_close(dist.entropy(), torch.full((N,), 2.0).log())
    assert (dist.logits[~steps["action_mask"]] < MASKED_LOGIT / 2).all()


def test_torchrls_action_mask_may_be_there_too():
    base, env, agent = make("categorical", has_action_mask=True)
    env.append_transform(agent.backbone.make_tensordict_primer())
    env.rollout(20, agent, break_when_any_done=False)
    assert base.steps == 20 * N
    assert base.invalid == 0


@pytest.mark.parametrize("kind", ["rollout", "plain"])
def test_a_mask_without_a_valid_action_names_environment_and_step(kind):
    base, env, agent = make("categorical")
    seen, calls = base._seen, []

    def no_option(done):
        entries = seen(done)
        calls.append(1)
        if len(calls) == 4:  # the reset is the first, so this is seen before step 3
            entries["action_mask"][5] = False
        return entries

    base._seen = no_option
    buffer = RecurrentRolloutBuffer(N * T, 8, 6, num_envs=N)
    calls.append(1)
    collector = collectors(env, agent, buffer, kind)
    with pytest.raises(NoValidActionError, match="environment 5 allows no action at step 2 of the rollout"):
        next(iter(collector))


def test_masks_fit_the_choices():
    base, env, _ = make("categorical")
    encoder = build_encoder(env.observation_spec, batch_dims=1, features=8)
    with pytest.raises(ValueError, match=r"the action mask has shape \[3\]; needed: 4"):
        PPOAgent(
            encoder, Backbone(build_gru(8, hidden_size=8)), base.action_spec, batch_dims=1,
            action_mask="action_mask", mask_shape=[3],
        )  # fmt: skip
