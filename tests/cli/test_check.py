"""The command: its table, its JSON, its picture and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cyborg_torchrl.cli.main import main
from cyborg_torchrl.memory_benchmarks import end_to_end

NAMES = [
    "buffer size for vectorised environments",
    "state storage and retrieval",
    "full training loop",
    "gradient flow",
]
THIRD_PARTY = """
import torch
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torchrl.envs import InitTracker, TransformedEnv
from torchrl.modules import GRUModule
from torchrl.modules.utils import get_primers_from_module

from cyborg_torchrl import DelayedCueEnv


def build():
    policy = ProbabilisticTensorDictSequential(
        GRUModule(6, 8, in_keys=["observation", "h"], out_keys=["memory", ("next", "h")]),
        TensorDictModule(torch.nn.Linear(8, 4), in_keys=["memory"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
            log_prob_key="action_log_prob",
        ),
    )
    env = TransformedEnv(DelayedCueEnv(4, horizon=5, seed=0), InitTracker())
    env.append_transform(get_primers_from_module(policy))
    return policy, env


def build_without_primer():
    policy, _ = build()
    return policy, TransformedEnv(DelayedCueEnv(4, horizon=5, seed=0), InitTracker())


def build_detached():
    policy, env = build()
    gru = policy.module[0]
    forward = gru.forward

    def cut(tensordict):
        result = forward(tensordict)
        return result.set("memory", result["memory"].detach())

    gru.forward = cut
    return policy, env


def build_nothing():
    return None


class Leaky:
    def initial_state(self, batch):
        return torch.zeros(batch, 3)

    def step(self, observation, state, is_first):
        state = 0.8 * state * ~is_first.unsqueeze(-1) + observation
        return state.tanh(), state

    def sequence(self, observations, state, is_first):
        rows = []
        for t in range(observations.shape[1]):
            output, state = self.step(observations[:, t], state, is_first[:, t])
            rows.append(output)
        return torch.stack(rows, 1)

    def parameters(self):
        return []


def build_functions():
    return Leaky(), torch.randn(3, 20, 3)
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "their_policy.py").write_text(THIRD_PARTY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return "their_policy"


def test_a_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    path, picture = tmp_path / "report.json", tmp_path / "horizon.png"
    assert main(["check", "--backbone", "lru", "--json", str(path), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert all(f"PASS  lru: {name}" in out for name in NAMES)
    assert "passed: lru" in out
    content = json.loads(path.read_text())
    assert content["has_passed"] is True
    assert [test["name"] for test in content["policies"]["lru"]["tests"]] == NAMES
    assert content["policies"]["lru"]["report"]["has_passed"] is True
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_policy_of_somebody_else(third_party: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    assert main(["check", "--policy", f"{third_party}:build", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["policies"][f"{third_party}:build"]["tests"] == []
    assert main(["check", "--policy", f"{third_party}:build_detached"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_functions_of_somebody_else_and_the_page(third_party: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    page = tmp_path / "report.html"
    assert main(["check", f"{third_party}:build_functions", "--html", str(page)]) == 0
    text = page.read_text()
    assert "their_policy:build_functions" in text
    assert "All policies passed." in text
    assert main(["check", f"{third_party}:build_detached", "--html", str(page)]) == 1
    text = page.read_text()
    assert "Failed: their_policy:build_detached" in text
    assert "<svg" in text
    assert text.index("gradient horizon") < text.index("repeatable"), "failures come first"


def test_a_run(save_trained: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(save_trained("backbone=gru", "backbone.hidden_size=8"))]) == 0
    assert "passed" in capsys.readouterr().out


def test_a_model_of_sb3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sb3 = pytest.importorskip("sb3_contrib")
    gymnasium = pytest.importorskip("gymnasium")
    path = tmp_path / "model.zip"
    sb3.RecurrentPPO("MlpLstmPolicy", gymnasium.make("CartPole-v1"), policy_kwargs={"lstm_hidden_size": 8}).save(path)
    assert main(["check", "--library", "sb3", str(path)]) == 0
    assert "Sb3Policy: passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "gruu"], "gru"),
        (["--policy", "their_policy:biuld"], "biuld"),
        (["--policy", "no_such_module:build"], "no_such_module"),
        (["--policy", "their_policy"], "must name a function"),
        (["--policy", "os:path"], "is no function"),
        (["--policy", "their_policy:build_nothing"], "must return (policy, env)"),
        (["--policy", "their_policy:build_without_primer"], "get_primers_from_module"),
        (["their_policy.py"], "without its file"),
        (["no/such/run"], "it is no run"),
        (["--library", "sb3", "no_model.zip"], "is no file"),
        (["--library", "sb3"], "name a model file"),
        (["runs/x", "--all"], "name a target, or"),
        (["--library", "sb3", "their_policy.py"], "their_policy.py"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    third_party: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *arguments]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert message in err[0]


def test_the_four_tests_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that zeroes states, a chance policy, a detached memory: each fails the test that is named for it."""
    store = end_to_end.RecurrentRolloutBuffer.store

    def store_zeros(self: object, rollout: object) -> None:
        store(self, rollout.clone().set("memory_state", rollout["memory_state"].apply(torch.zeros_like)))

    monkeypatch.setattr(end_to_end.RecurrentRolloutBuffer, "store", store_zeros)
    monkeypatch.setattr(end_to_end, "MAX_STEPS", 1500)
    monkeypatch.setattr(end_to_end, "SUCCESS", 1.1)
    backward = end_to_end.build_agent

    def build_detached(*args: object) -> object:
        agent = backward(*args)
        agent.backbone.core.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(), *inputs[1:]))
        return agent

    monkeypatch.setattr(end_to_end, "build_agent", build_detached)
    results = {result.name: result for result in end_to_end.run_end_to_end("lru", seed=0)}
    assert [result.is_passed for result in results.values()] == [True, False, False, False]
    assert "another 'hidden'" in results["state storage and retrieval"].detail
    assert "does not reach the cue" in results["gradient flow"].detail
