"""NaN stops a run: the error names step, entry and environment; there are a dump and the last good checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cyborg_torchrl.cli.main import main
from cyborg_torchrl.config import load_config
from cyborg_torchrl.envs import DelayedCueEnv
from cyborg_torchrl.envs.memory.task import Transition
from cyborg_torchrl.modules import PPOAgent
from cyborg_torchrl.modules.nan_check import NonFiniteError
from cyborg_torchrl.training import trainer as trainer_module
from cyborg_torchrl.training.builders import build_trainer
from cyborg_torchrl.training.checkpoint import load_checkpoint
from cyborg_torchrl.training.command import run_command

OPTIONS = ["env.num_envs=4", "env.horizon=5", "train.n_epochs=2", "train.num_minibatches=2", "logger.progress=false"]
OPTIONS += [
    "logger.tensorboard=false",
    "logger.eval_episodes=0",
    "train.total_timesteps=140",
]  # five updates of 7 steps


def broken_env(monkeypatch: pytest.MonkeyPatch, entry: str, environment: int, call: int) -> None:
    """Make an entry of one environment NaN at a step of the whole run, counted from 0."""
    advance, calls = DelayedCueEnv.advance, Counter[int]()

    def broken(env: DelayedCueEnv, action: Tensor) -> Transition:
        result = advance(env, action)
        if calls[id(env)] == call:
            value = getattr(result, entry).clone()
            value[environment] = torch.nan
            result = result._replace(**{entry: value})
        calls[id(env)] += 1
        return result

    monkeypatch.setattr(DelayedCueEnv, "advance", broken)


@pytest.mark.parametrize("collector", ["rollout", "fused"])
@pytest.mark.parametrize(("entry", "key", "late"), [("observation", "observation", 1), ("reward", "next/reward", 0)])
def test_the_error_names_entry_environment_and_step(entry, key, late, collector, tmp_path, monkeypatch, capsys) -> None:
    """Entries are NaN in the third update. A step writes the observation that the next step reads."""
    broken_env(monkeypatch, entry, environment=1, call=14 + 3)
    options = [*OPTIONS, f"logger.base_dir={tmp_path}", "logger.run_name=run", f"collector={collector}"]
    assert run_command("memory_delayed_cue_recurrent", options) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"'{key}' is nan in environment 1 at step {3 + late} of the rollout (update 3, after 56 steps)" in line
    run = tmp_path / "run"
    assert f"the last good checkpoint is {run / 'checkpoints' / 'last.pt'}" in line
    assert load_checkpoint(run / "checkpoints" / "last.pt")["update"] == 2
    dump = run / "dumps" / "update_00000003.pt"
    assert str(dump) in line
    assert main(["replay", str(dump)]) == 0
    out = capsys.readouterr().out
    assert f"step {3 + late}  <--" in out
    result = json.loads(out.splitlines()[-1])
    assert (result["key"], result["environment"], result["step"], result["update"]) == (key, 1, 3 + late, 3)
    # the agent reads observations, so it computes NaN again; it does not read rewards
    assert result["is_reproduced"] == (entry == "observation")
    assert result["first_step_without_log_prob"] == (3 + late if entry == "observation" else None)


@pytest.mark.parametrize(
    ("mode", "first_step"),
    [
        (["train=episode"], 0),
        (["train=none"], 3),
        (["train=tbptt", "train.seq_len=3"], 3),
        (["train=burn_in", "train.seq_len=3", "train.burn_in=2"], 1),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_loss_that_is_not_finite_is_traced_to_its_sequence(mode, first_step, monkeypatch) -> None:
    """One advantage of environment 2 is infinite. The error names the start of its sequence; no parameter is NaN."""
    add = trainer_module.add_advantages

    def infinite(steps, *arguments, **options):
        add(steps, *arguments, **options)
        steps["advantage"][2, 3] = torch.inf

    monkeypatch.setattr(trainer_module, "add_advantages", infinite)
    trainer, agent, _ = build_trainer(load_config(overrides=[*OPTIONS, *mode, "train.normalize_advantage=none"]))
    rollout = trainer.collector.rollout()
    message = rf"'loss_objective' is (nan|-?inf) in environment 2 at step {first_step} of the rollout"
    with pytest.raises(NonFiniteError, match=message) as caught:
        trainer.update(rollout)
    row = caught.value.record["row"]
    actions = row["action"].reshape(-1)[: 4 - first_step]
    assert row["advantage"].isinf().reshape(-1).nonzero().tolist() == [[3 - first_step]]
    assert torch.equal(actions, rollout.steps["action"][2, first_step:4])
    assert all(value.isfinite().all() for value in agent.state_dict().values())


def test_acting_without_fusion_names_the_entry_too() -> None:
    """TorchRL's collector calls the agent like this. Torch's error would only say that a probability is NaN."""
    cfg = load_config(overrides=[*OPTIONS, "collector=single"])
    trainer, agent, _ = build_trainer(cfg)
    assert isinstance(agent, PPOAgent)
    carried = trainer.collector.env.reset()
    carried["observation"][3, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="'observation' is nan in environment 3"):
        agent(carried)


def test_replay_refuses_other_files_than_dumps(tmp_path, monkeypatch, capsys) -> None:
    broken_env(monkeypatch, "reward", environment=0, call=8)
    options = [*OPTIONS, f"logger.base_dir={tmp_path}", "logger.run_name=run"]
    assert run_command("memory_delayed_cue_recurrent", options) == 1
    run = tmp_path / "run"
    for arguments, message in (
        (["replay", str(run / "checkpoints" / "last.pt")], "is not a dump of cyborg_torchrl"),
        (["replay", str(tmp_path / "no.pt")], "no dump"),
        (["replay", str(Path(__file__))], "not a readable checkpoint"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
