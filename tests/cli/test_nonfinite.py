"""NaN stops a run: with the step, the entry and the environment, a dump, and the last good checkpoint."""

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
def test_it_names_what_where_and_when(entry, key, late, collector, tmp_path, monkeypatch, capsys) -> None:
    """The third update; a step writes the observation that the next one reads."""
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
    said = json.loads(out.splitlines()[-1])
    assert (said["key"], said["environment"], said["step"], said["update"]) == (key, 1, 3 + late, 3)
    # an agent that reads NaN says NaN again; a reward it does not read
    assert said["is_reproduced"] == (entry == "observation")
    assert said["first_step_without_log_prob"] == (3 + late if entry == "observation" else None)


def test_a_loss_that_is_not_finite_is_traced_to_its_sequence(monkeypatch) -> None:
    """The advantage of one environment is infinite; no parameter is spoiled."""
    add = trainer_module.add_advantages

    def infinite(steps, *arguments, **options):
        add(steps, *arguments, **options)
        steps["advantage"][2, 3] = torch.inf

    monkeypatch.setattr(trainer_module, "add_advantages", infinite)
    trainer, agent, _ = build_trainer(load_config(overrides=[*OPTIONS, "train.normalize_advantage=none"]))
    rollout = trainer.collector.rollout()
    with pytest.raises(NonFiniteError, match=r"'loss_objective' is (nan|-?inf) in environment 2 at step 0") as caught:
        trainer.update(rollout)
    row = caught.value.record["row"]
    assert row["advantage"].isinf().reshape(-1).nonzero().tolist() == [[3]]
    assert torch.equal(row["action"][0], rollout.steps["action"][2])
    assert all(value.isfinite().all() for value in agent.state_dict().values())


def test_acting_without_fusion_names_it_too() -> None:
    """As TorchRL's own collector acts: torch would say that a probability is NaN, and no more."""
    cfg = load_config(overrides=[*OPTIONS, "collector=single"])
    trainer, agent, _ = build_trainer(cfg)
    assert isinstance(agent, PPOAgent)
    carried = trainer.collector.env.reset()
    carried["observation"][3, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="'observation' is nan in environment 3"):
        agent(carried)


def test_a_dump_is_no_checkpoint_and_the_other_way_round(tmp_path, monkeypatch, capsys) -> None:
    broken_env(monkeypatch, "reward", environment=0, call=8)
    options = [*OPTIONS, f"logger.base_dir={tmp_path}", "logger.run_name=run"]
    assert run_command("memory_delayed_cue_recurrent", options) == 1
    run = tmp_path / "run"
    for arguments, said in (
        (["replay", str(run / "checkpoints" / "last.pt")], "is not a dump of cyborg_torchrl"),
        (["replay", str(tmp_path / "no.pt")], "no dump"),
        (["replay", str(Path(__file__))], "not a readable checkpoint"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert said in line
