"""The checker of environments against environments of known faults."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import Compose, EnvBase, GymEnv, InitTracker, TransformedEnv

from cyborg_torchrl.checks import check_environment

LENGTH = 6


class NoisyCounter(EnvBase):
    """Shows a random number drawn at the start of each episode, and the time; truncated after LENGTH steps.

    Each environment has its own generator. `fault` breaks one promise.
    """

    def __init__(self, num_envs: int = 3, fault: str = "") -> None:
        super().__init__(batch_size=[num_envs], device="cpu")
        self.fault, self.num_envs = fault, num_envs
        self.max_episode_steps = LENGTH - 1 if fault == "too_long" else LENGTH
        flag = (num_envs, 1)
        high = 3.0 if fault == "outside" else 100.0
        self.observation_spec = Composite(observation=Bounded(0.0, high, (num_envs, 2)), shape=[num_envs])
        self.action_spec = Categorical(2, shape=[num_envs])
        self.reward_spec = Unbounded((num_envs,) if fault == "flat_reward" else flag)
        ends = ("done", "terminated", "truncated")
        self.done_spec = Composite({key: Binary(1, flag, dtype=torch.bool) for key in ends}, shape=[num_envs])
        self.time, self.drawn = torch.zeros(num_envs), torch.zeros(num_envs)
        self._set_seed(0)

    def _set_seed(self, seed: int | None) -> None:
        if self.fault != "no_seed" or not hasattr(self, "generators"):
            first = 0 if self.fault == "one_seed" else seed or 0
            self.generators = [torch.Generator().manual_seed(1000 * first + i) for i in range(self.num_envs)]

    def _draw(self, mask: Tensor) -> Tensor:
        pairs = zip(self.generators, mask.tolist(), strict=True)
        return torch.stack([torch.rand((), generator=g) if hit else torch.zeros(()) for g, hit in pairs])

    def _show(self, done: Tensor, terminated: Tensor) -> TensorDict:
        time = self.time + float(self.fault == "others_jump" and self.has_partly_reset)
        return TensorDict(
            {
                "observation": torch.stack([self.drawn, time], -1),
                "done": done,
                "terminated": terminated,
                "truncated": done & ~terminated,
            },
            self.batch_size,
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **_: object) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        self.has_partly_reset = mask is not None
        mask = torch.ones(self.num_envs, dtype=torch.bool) if mask is None else mask.squeeze(-1)
        if self.fault == "resets_all":
            mask = torch.ones_like(mask)
        self.drawn = torch.where(mask, self._draw(mask), self.drawn)
        self.time = self.time.masked_fill(mask, 0.0)
        no = torch.zeros(self.num_envs, 1, dtype=torch.bool)
        return self._show(no, no.clone())

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.time = self.time + 1
        done = (self.time >= LENGTH).unsqueeze(-1)
        result = self._show(done, done if self.fault == "terminates" else torch.zeros_like(done))
        reward = torch.ones(self.num_envs, 1) * (float("nan") if self.fault == "nan" else 1.0)
        result["reward"] = reward
        if self.fault == "done_alone":
            result["truncated"] = torch.zeros_like(done)
        if self.fault == "raises":
            raise KeyError("lost")
        return result


def verdicts(fault: str = "", **options: object) -> dict[str, str]:
    return {f.name: f.verdict for f in check_environment(NoisyCounter(fault=fault), **options)}


@pytest.mark.parametrize("tracked", [False, True])
def test_a_sound_environment(tracked: bool) -> None:
    env = NoisyCounter()
    env = TransformedEnv(env, Compose(InitTracker())) if tracked else env
    findings = check_environment(env, time_limit="truncated")
    assert {finding.verdict for finding in findings} == {"ok"}, findings
    assert [f.name for f in findings] == [
        "specs", "shapes", "seeds", "no_shift", "wrapper", "ends", "length", "partial_reset",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "check", "words"),
    [
        ("outside", "specs", ""),
        ("nan", "shapes", "not finite"),
        ("no_seed", "seeds", "do not repeat"),
        ("done_alone", "ends", "not 'terminated or truncated'"),
        ("too_long", "length", "goes on after max_episode_steps = 5"),
        ("terminates", "length", "must be 'truncated'"),
        ("resets_all", "partial_reset", "the others go on differently: ['observation'"),
        ("others_jump", "partial_reset", "the others go on differently: ['observation'] at step 4"),
    ],
)
def test_faults_are_found_where_they_are(fault: str, check: str, words: str) -> None:
    findings = check_environment(NoisyCounter(fault=fault), time_limit="truncated")
    found = {finding.name: finding for finding in findings}[check]
    assert found.verdict == "broken", "\n".join(map(str, findings))
    assert words in found.detail
    assert "\n" not in str(found)


def test_an_unused_seed_is_said_and_not_judged() -> None:
    assert verdicts("one_seed")["seeds"] == "not_checked"


def test_what_cannot_be_played() -> None:
    (finding,) = check_environment(NoisyCounter(fault="raises"))
    assert str(finding) == "broken       play: it cannot be played: KeyError: 'lost'"


def test_what_was_not_seen_is_not_judged() -> None:
    found = verdicts(num_steps=3)
    assert (found["ends"], found["length"]) == ("not_checked", "not_checked")
    assert {f.name: f.verdict for f in check_environment(NoisyCounter(1))}["partial_reset"] == "not_checked"


def test_torchs_generator_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    check_environment(NoisyCounter())
    assert torch.equal(torch.get_rng_state(), before)


def test_an_environment_of_gymnasium() -> None:
    pytest.importorskip("gymnasium")
    env = GymEnv("CartPole-v1", categorical_action_encoding=True)
    found = {finding.name: finding for finding in check_environment(env)}
    assert {found[name].verdict for name in ("specs", "shapes", "seeds", "no_shift", "ends")} == {"ok"}
    assert "give train.n_steps" in found["length"].detail
