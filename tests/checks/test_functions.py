"""The framework-free interface: plain functions in numpy or torch, and what a training loop stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cyborg_torchrl.checks import DiscreteActorCritic, Finding, Recorder, Report, check_memory, check_padding

OPTIONS: dict[str, Any] = {"chunk_lengths": (1, 8), "drift_updates": 2}
N, T = 4, 20


def failed_names(report: Report) -> set[str]:
    return {finding.name for finding in report.failed}


class Lstm(nn.Module):
    """An LSTM with (layers, batch, width) states, as most libraries have them."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 8, num_layers=2)
        self.head, self.critic = nn.Linear(8, 4), nn.Linear(8, 1)

    def initial_state(self, batch: int) -> dict[str, tuple[Tensor, Tensor]]:
        return {"lstm": (torch.zeros(2, batch, 8), torch.zeros(2, batch, 8))}

    def step(self, observation: Tensor, state: Any, is_first: Tensor) -> tuple[Any, Any]:
        keep = (~is_first).view(1, -1, 1)
        features, following = self.cell(observation.unsqueeze(0), tuple(part * keep for part in state["lstm"]))
        return self.outputs(features[0]), {"lstm": following}

    def outputs(self, features: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(features), "value": self.critic(features).squeeze(-1)}

    def sequence(self, observations: Tensor, state: Any, is_first: Tensor) -> Any:
        rows = []
        for t in range(observations.shape[1]):
            outputs, state = self.step(observations[:, t], state, is_first[:, t])
            rows.append(outputs)
        return {name: torch.stack([row[name] for row in rows], 1) for name in rows[0]}

    def value(self, outputs: Any) -> Tensor:
        return outputs["value"]

    def log_prob(self, outputs: Any, actions: Tensor) -> Tensor:
        return torch.distributions.Categorical(logits=outputs["logits"]).log_prob(actions)


class ActsWithoutGradient(Lstm):
    """Healthy: acting computes its logits without gradients, as many libraries do."""

    def sequence(self, observations: Tensor, state: Any, is_first: Tensor) -> Any:
        rows = []
        for t in range(observations.shape[1]):
            outputs, state = Lstm.step(self, observations[:, t], state, is_first[:, t])
            rows.append(outputs)
        return {name: torch.stack([row[name] for row in rows], 1) for name in rows[0]}

    def step(self, observation: Tensor, state: Any, is_first: Tensor) -> tuple[Any, Any]:
        outputs, state = super().step(observation, state, is_first)
        return {**outputs, "logits": outputs["logits"].detach()}, state


class Counted(Lstm):
    """Healthy: the state also holds an integer for each environment."""

    def initial_state(self, batch: int) -> Any:
        return {**super().initial_state(batch), "count": torch.zeros(batch, dtype=torch.long)}

    def step(self, observation: Tensor, state: Any, is_first: Tensor) -> tuple[Any, Any]:
        outputs, following = super().step(observation, state, is_first)
        return outputs, {**following, "count": torch.where(is_first, 0, state["count"]) + 1}


class Decay:
    """A leaky sum in numpy, without parameters."""

    weights = np.array([[1.0, 0.5], [-0.5, 1.0], [0.3, 0.2]], dtype=np.float32)

    def initial_state(self, batch: int) -> list[np.ndarray]:
        return [np.zeros((batch, 3), dtype=np.float32)]

    def step(self, observation: np.ndarray, state: list[np.ndarray], is_first: np.ndarray) -> tuple[Any, Any]:
        total = 0.8 * state[0] * ~is_first[:, None] + observation
        return np.tanh(total) @ self.weights, [total]

    def sequence(self, observations: np.ndarray, state: list[np.ndarray], is_first: np.ndarray) -> np.ndarray:
        rows = []
        for t in range(observations.shape[1]):
            outputs, state = self.step(observations[:, t], state, is_first[:, t])
            rows.append(outputs)
        return np.stack(rows, 1)

    def parameters(self) -> Iterator[Tensor]:
        return iter(())


def test_torch_functions_are_healthy_and_unchanged() -> None:
    policy = Lstm()
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    report = check_memory(policy, torch.randn(N, T, 3), **OPTIONS)
    assert failed_names(report) == set()
    assert report.policy == "Lstm"
    assert report["gradient: sequence against steps"].verdict == "passed"
    assert report["gradient horizon"].verdict == "passed"
    assert report.drift is not None
    assert report.drift.updates == (1, 2)
    assert all(torch.equal(old, new) for old, new in zip(before, policy.parameters(), strict=True))
    assert all(parameter.grad is None and parameter.dtype == torch.float32 for parameter in policy.parameters())


def test_parts_of_acting_without_gradient() -> None:
    report = check_memory(ActsWithoutGradient(), torch.randn(N, T, 3), **OPTIONS)
    assert failed_names(report) == set()
    assert report["gradient: sequence against steps"].verdict == "passed", "the value was compared"


def test_an_actor_critic_reads_its_outputs() -> None:
    policy = DiscreteActorCritic(nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 1)]))
    outputs = torch.tensor([[1.0, 3.0], [5.0, 5.0]]).log(), torch.tensor([7.0, 8.0])
    assert policy.log_prob(outputs, torch.tensor([1, 0])).exp().tolist() == pytest.approx([0.75, 0.5])
    assert policy.value(outputs).tolist() == [7.0, 8.0]
    assert len(list(policy.parameters())) == 4


def test_integers_in_a_state() -> None:
    assert failed_names(check_memory(Counted(), torch.randn(N, T, 3), **OPTIONS)) == set()


def test_numpy_functions_are_healthy() -> None:
    observations = np.random.default_rng(0).normal(size=(N, T, 3)).astype(np.float32)
    report = check_memory(Decay(), observations, **OPTIONS)
    assert failed_names(report) == set()
    assert report["reset leak: sequence mode"].verdict == "passed"
    assert report["gradient horizon"].verdict == "not_applicable", "there are no gradients"


class LateNumpy(Decay):
    def sequence(self, observations: np.ndarray, state: list[np.ndarray], is_first: np.ndarray) -> np.ndarray:
        late = np.roll(is_first, 1, axis=1)
        late[:, 0] = is_first[:, 0]
        return super().sequence(observations, state, late)


class WrongScan(Lstm):
    """The outputs of a sequence are right, and the gradient through time is halved."""

    def sequence(self, observations: Tensor, state: Any, is_first: Tensor) -> Any:
        rows = []
        for t in range(observations.shape[1]):
            outputs, state = self.step(observations[:, t], state, is_first[:, t])
            state = {"lstm": tuple(0.5 * part + 0.5 * part.detach() for part in state["lstm"])}
            rows.append(outputs)
        return {name: torch.stack([row[name] for row in rows], 1) for name in rows[0]}


class NoGradient(Lstm):
    def sequence(self, observations: Tensor, state: Any, is_first: Tensor) -> Any:
        with torch.no_grad():
            return super().sequence(observations, state, is_first)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (LateNumpy, "reset timing: sequence mode"),
        (WrongScan, "gradient: sequence against steps"),
        (NoGradient, "gradient horizon"),
    ],
)
def test_faults_of_functions(build: Callable[[], Any], expected: str) -> None:
    draws = torch.randn(N, T, 3)
    report = check_memory(build(), draws.numpy() if build is LateNumpy else draws, **OPTIONS)
    assert failed_names(report) == {expected}
    consequences = {finding.name for finding in report.findings if finding.verdict == "consequence"}
    assert ("step against sequence" in consequences) == (build is LateNumpy)


def record(policy: Lstm, *, damage: str = "") -> Report:
    """Act as a library would, store it, and replay it. Episodes begin at random."""
    recorder = Recorder(policy)
    flags = torch.rand(N, T + 1) < 0.1
    flags[:, 0] = True
    observations, state = torch.randn(N, T + 1, 3), policy.initial_state(N)
    with torch.no_grad():
        for t in range(T):
            outputs, following = policy.step(observations[:, t], state, flags[:, t])
            action = torch.distributions.Categorical(logits=outputs["logits"]).sample()
            stored = following if damage == "next state" else state
            log_prob = policy.log_prob(outputs, action)
            keep = None if damage == "no state" and t else stored
            recorder.add(observations[:, t], flags[:, t], state=keep, action=action, log_prob=log_prob)
            state = following
        start = policy.initial_state(N) if damage == "restarted value" else state
        value = policy.step(observations[:, T], start, torch.zeros(N, dtype=torch.bool))[0]["value"]
    recorder.bootstrap(observations[:, T], value, rows=~flags[:, T])
    return recorder.check(**OPTIONS)


def test_a_recorded_loop_is_healthy() -> None:
    report = record(Lstm())
    assert failed_names(report) == set()
    assert report["bootstrapped values"].verdict == "passed"
    assert report["same state: chunks of 8"].verdict == "passed"


def test_states_that_are_not_stored_are_replayed() -> None:
    assert failed_names(record(Lstm(), damage="no state")) == set()


def test_states_of_the_next_step() -> None:
    report = record(Lstm(), damage="next state")
    assert "same state: single steps" in failed_names(report)
    assert "states are off by one" in report["same state: single steps"].explanation
    assert not any(name.startswith(("reset", "environment", "gradient")) for name in failed_names(report))


def test_values_of_a_restarted_memory() -> None:
    report = record(Lstm(), damage="restarted value")
    assert failed_names(report) == {"bootstrapped values"}
    assert "restarted memory" in report["bootstrapped values"].explanation


def test_refusals() -> None:
    policy = Lstm()
    with pytest.raises(ValueError, match="at least 4"):
        check_memory(policy, torch.randn(N, 3, 3))
    with pytest.raises(ValueError, match="something to compare with"):
        Recorder(policy).add(torch.randn(N, 3), torch.ones(N))
    with pytest.raises(ValueError, match="add a step before"):
        Recorder(policy).bootstrap(torch.randn(N, 3), torch.zeros(N))
    policy.initial_state = lambda batch: torch.zeros(1, 8)
    with pytest.raises(ValueError, match="one dimension must be the batch"):
        check_memory(policy, torch.randn(N, T, 3))
    policy.initial_state = lambda batch: ()
    with pytest.raises(ValueError, match="no memory to check"):
        check_memory(policy, torch.randn(N, T, 3))
    policy = Lstm()
    policy.sequence = lambda observations, state, is_first: torch.zeros(N * observations.shape[1], 5)
    with pytest.raises(ValueError, match=r"\[B, T, ...\] from sequence"):
        check_memory(policy, torch.randn(N, T, 3), **OPTIONS)


def test_padding() -> None:
    mask = torch.arange(T) >= torch.tensor([T, 12, 9, 15]).unsqueeze(1)
    batch = {"x": torch.randn(N, T, 3), "n": np.arange(N * T).reshape(N, T), "other": torch.zeros(2)}

    def loss(batch: dict[str, Any], where: Tensor) -> Finding | Tensor:
        return (batch["x"].sum(-1) + torch.as_tensor(batch["n"]))[where].mean()

    assert check_padding(lambda batch: loss(batch, ~mask), batch, mask).verdict == "passed"
    assert check_padding(lambda batch: loss(batch, mask | ~mask), batch, mask).verdict == "failed"
    assert check_padding(lambda batch: torch.rand(1), batch, mask).verdict == "not_applicable"
    assert check_padding(lambda batch: loss(batch, ~mask), batch, mask & ~mask).verdict == "not_applicable"
