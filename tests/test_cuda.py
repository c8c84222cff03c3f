"""On a GPU: the same cores, collectors, checks and runs as on a CPU."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import core_speed
from cyborg_torchrl.checks import check_recurrent
from cyborg_torchrl.cli.main import main
from cyborg_torchrl.config import load_config
from cyborg_torchrl.cores import Core
from cyborg_torchrl.envs import DelayedCueEnv
from cyborg_torchrl.envs.memory.task import Transition
from cyborg_torchrl.registry import backbones
from cyborg_torchrl.training.builders import build_agent, build_env
from cyborg_torchrl.training.checkpoint import load_checkpoint
from cyborg_torchrl.training.command import run_command
from cyborg_torchrl.training.experiment import run_experiment
from cyborg_torchrl.training.loading import load_agent
from cyborg_torchrl.training.trainer import PPOTrainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

ROWS, STEPS = 3, 70
SMALL = ["env.num_envs=4", "env.horizon=5", "train.n_epochs=2", "train.num_minibatches=2", "train.n_steps=7"]
SMALL += ["logger.progress=false", "logger.tensorboard=false", "logger.eval_episodes=0", "train.total_timesteps=140"]


def outcome(core: Core, x: Tensor, state: dict[str, Tensor], is_init: Tensor) -> list[Tensor]:
    """Outputs, last states, and the gradients of parameters, inputs and the stored state."""
    x = x.detach().clone().requires_grad_()
    state = {name: value.detach().clone().requires_grad_() for name, value in state.items()}
    y, last = core(x, state, is_init)
    weight = torch.linspace(-1, 1, y.numel(), device="cpu").reshape(y.shape).to(y.device)
    loss = (y * weight).sum() + sum(value.sum() for value in last.values())
    wanted = [*core.parameters(), x, *state.values()]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [value.detach().cpu() for value in (y, *last.values(), *(g for g in grads if g is not None))]


def test_a_core_is_the_same_on_a_gpu(
    build_core: Callable[..., Core], stored_state: Callable, random_resets: Callable
) -> None:
    core = build_core()
    x, is_init, state = torch.randn(ROWS, STEPS, core.in_features), random_resets(ROWS, STEPS), stored_state(core, ROWS)
    expected = outcome(core, x, state, is_init)
    moved = copy.deepcopy(core).cuda()
    there = outcome(moved, x.cuda(), {name: value.cuda() for name, value in state.items()}, is_init.cuda())
    for ours, theirs in zip(there, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-3 * max(1.0, float(theirs.abs().max()))


def test_steps_on_a_gpu_equal_the_sequence(
    build_core: Callable[..., Core], stored_state: Callable, random_resets: Callable
) -> None:
    core = build_core()
    x, is_init, state = torch.randn(ROWS, STEPS, core.in_features), random_resets(ROWS, STEPS), stored_state(core, ROWS)
    core = core.cuda()
    x, is_init, state = x.cuda(), is_init.cuda(), {name: value.cuda() for name, value in state.items()}
    with torch.no_grad():
        y, _ = core(x, state, is_init)
        initial = core.initial_state(ROWS)
        for t in range(STEPS):
            where = {name: is_init[:, t].view(-1, *[1] * (value.ndim - 1)) for name, value in state.items()}
            state = {name: torch.where(where[name], initial[name], value) for name, value in state.items()}
            y_t, state = core.step(x[:, t], state)
            assert (y_t - y[:, t]).abs().max() <= 1e-4, t


@pytest.mark.parametrize("backbone", backbones.names())
def test_the_checker_finds_nothing(backbone: str) -> None:
    cfg = load_config(overrides=[f"backbone={backbone}", "env.horizon=20", "train.device=cuda"])
    env = build_env(cfg, num_envs=4)
    agent = build_agent(cfg, env)
    env.append_transform(agent.backbone.make_tensordict_primer())
    report = check_recurrent(agent, env)
    assert report.has_passed, report.table()


@pytest.mark.parametrize("backbone", ["gru", "lstm", "lru", "mamba", "mamba2"])
def test_batches_equal_those_of_torchrls_collector(backbone: str, batches_of_both: Callable) -> None:
    for ours, theirs in batches_of_both("train.device=cuda", f"backbone={backbone}"):
        for key in theirs.keys(True, True):
            assert torch.equal(ours[key].cpu(), theirs[key].cpu()), key


# backward, mamba-ssm's kernels add in any order: two runs with them differ in the last bits
@pytest.mark.parametrize(
    "more", [["backbone=lru"], ["backbone=mamba_gru", "backbone.kernel=torch"], ["memory=pmm"]], ids=str
)
def test_a_run_that_is_cut_short_goes_on_as_if_it_had_not_been(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str, *options: str):
        own = [f"logger.base_dir={tmp_path}", f"logger.run_name={name}", "train.device=cuda"]
        return load_config(overrides=[*SMALL, *more, *own, *options])

    class Killed(BaseException):
        pass

    run_experiment(config("whole"))
    update = PPOTrainer.update

    def cut_short(trainer: PPOTrainer, rollout) -> dict[str, float]:
        if trainer.num_updates == 2:
            raise Killed
        return update(trainer, rollout)

    cut = config("cut", "resume=auto")
    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "update", cut_short)
        with pytest.raises(Killed):
            run_experiment(cut)
    torch.manual_seed(99)
    run_experiment(cut)
    ends = [load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["agent"] for name in ("whole", "cut")]
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key


def test_what_was_trained_on_a_gpu_acts_on_a_cpu(tmp_path: Path) -> None:
    own = [f"logger.base_dir={tmp_path}", "logger.run_name=run", "train.device=cuda"]
    run_experiment(load_config(overrides=[*SMALL, *own]))
    checkpoint = tmp_path / "run" / "checkpoints" / "last.pt"
    there, here = load_agent(checkpoint).agent, load_agent(checkpoint, ["train.device=cpu"]).agent
    assert {p.device.type for p in there.parameters()} == {"cuda"}
    assert {p.device.type for p in here.parameters()} == {"cpu"}
    seen, actions = torch.rand(2, 30, 6), torch.zeros(2, 30, dtype=torch.long)
    ours = here.evaluate_actions(seen, actions).log_prob
    theirs = there.evaluate_actions(seen.cuda(), actions.cuda()).log_prob.cpu()
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("more", "bound"), [([], 1e-5), (["train.state_stride=8", "train.state_dtype=float16"], 1e-2)], ids=str
)
def test_the_update_sees_what_the_agent_acted_with(more: list[str], bound: float, tmp_path: Path) -> None:
    own = [f"logger.base_dir={tmp_path}", "logger.run_name=run", "train.device=cuda", "train=burn_in"]
    run_experiment(load_config(overrides=[*own, *SMALL, "train.n_steps=8", "train.seq_len=4", *more]))
    lines = (tmp_path / "run" / "logs" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("ratio_error")
    errors = [float(line.split(",")[column]) for line in lines[1:]]
    assert len(errors) >= 2
    assert max(errors) <= bound


def test_the_dump_of_a_run_is_looked_into_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN in an observation of the second update: the agent comes to it again, on the CPU."""
    advance, calls = DelayedCueEnv.advance, 0

    def broken(env: DelayedCueEnv, action: Tensor) -> Transition:
        nonlocal calls
        result, calls = advance(env, action), calls + 1
        if calls == 7 + 3:
            result = result._replace(observation=result.observation.clone())
            result.observation[1] = torch.nan
        return result

    monkeypatch.setattr(DelayedCueEnv, "advance", broken)
    own = [f"logger.base_dir={tmp_path}", "logger.run_name=run", "train.device=cuda"]
    assert run_command("memory_delayed_cue_recurrent", [*SMALL, *own]) == 1
    assert "'observation' is nan in environment 1 at step 3 of the rollout (update 2" in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "run" / "dumps" / "update_00000002.pt")]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["environment"], said["first_step_without_log_prob"], said["is_reproduced"]) == (1, 3, True)


@pytest.mark.parametrize("option", ["collector=fused collector.cudagraph", "collector.cudagraph", "train.cudagraph"])
def test_a_run_with_a_graph_is_the_same_run(option: str, tmp_path: Path) -> None:
    own = [*SMALL, f"logger.base_dir={tmp_path}", "train.device=cuda"]
    for cudagraph in ("false", "true"):
        asked = [*f"{option}={cudagraph}".split(), f"logger.run_name=graphed_{cudagraph}"]
        run_experiment(load_config(overrides=[*own, *asked]))
    runs = [tmp_path / f"graphed_{cudagraph}" for cudagraph in ("false", "true")]
    ends = [load_checkpoint(run / "checkpoints" / "last.pt")["agent"] for run in runs]
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_benchmark_takes_a_gpu(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert core_speed.main(["--device", device, "--repeats", "1", "--only", "lru 128, 64 x 128"]) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out
