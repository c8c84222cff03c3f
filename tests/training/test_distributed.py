"""Two processes that train together, compared to one process that trains alone."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.training.checkpoint import load_checkpoint
from cyborg_torchrl.training.distributed import Ranks, joined_ranks, share_of_rank

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "rank_program.py"
CASES = list(runpy.run_path(str(PROGRAM))["CASES"])
THIS_CHECKOUT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TRAIN = ("-m", "cyborg_torchrl", "train")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """Return the results of one process alone, and of each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(PROGRAM), str(folder)]
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **THIS_CHECKOUT}
    running = [
        subprocess.Popen(command, env={**environment, "RANK": rank}, stderr=subprocess.PIPE, text=True) for rank in "01"
    ]
    for process in running:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    alone, first, second = (torch.load(folder / name) for name in ("alone.pt", "0.pt", "1.pt"))
    return alone, first, second


@pytest.mark.parametrize("case", CASES)
def test_two_processes_get_the_parameters_of_one(results: tuple[Any, Any, Any], case: str) -> None:
    """Compare the parameters after two updates of several epochs and minibatches on the same data."""
    alone, *both = (result[case] for result in results)
    tolerance = 1e-10 if "float64" in case else 1e-5
    for own in both:
        for found, expected in zip(own["parameters"], alone["parameters"], strict=True):
            assert (found - expected).abs().max() <= tolerance
    for found, expected in zip(*(own["parameters"] for own in both), strict=True):
        assert torch.equal(found, expected), "the processes have drifted apart"


@pytest.mark.parametrize("case", CASES)
def test_two_processes_report_the_metrics_of_one(results: tuple[Any, Any, Any], case: str) -> None:
    """Metrics cover all environments, except for the explained variance, which is the mean of both ranks."""
    alone, *both = (result[case]["metrics"] for result in results)
    assert both[0] == both[1]
    for own, whole in zip(both[0], alone, strict=True):
        assert own.keys() == whole.keys()
        assert whole["episodes"] > 0
        for name in own.keys() - {"explained_variance", "state_drift"} - {n for n in own if n.startswith("drift_")}:
            assert own[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-5), name


def test_both_stop_after_the_same_epoch(results: tuple[Any, Any, Any]) -> None:
    for result in results:
        assert [metrics["epochs"] for metrics in result["stopped"]["metrics"]] != [4, 4]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_each_step_counts_once_on_any_rank(results: tuple[Any, Any, Any], dtype: str, tolerance: float) -> None:
    alone, *both = (result["unequal"][dtype] for result in results)
    for own in both:
        for found, expected in zip(own, alone, strict=True):
            assert (found - expected).abs().max() <= tolerance


def test_moments_cover_the_numbers_of_all_ranks(results: tuple[Any, Any, Any]) -> None:
    numbers = 3.0 + 2.0 * torch.randn(5, 100, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = numbers.flatten(0, 1)
    for result in results:
        _, mean, var = result["moments"]
        torch.testing.assert_close(mean, seen.mean(0), rtol=1e-5, atol=0)
        torch.testing.assert_close(var, seen.var(0, correction=0), rtol=1e-5, atol=0)
    for own in results[1:]:
        for found, expected in zip(own["moments"], results[0]["moments"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_results_and_errors_of_the_first_rank_reach_all(results: tuple[Any, Any, Any]) -> None:
    assert [result["from_first"] for result in results] == [{"rank": 0}] * 3
    assert [result["error"] for result in results] == ["rank 0 has failed"] * 3


def test_objects_are_gathered(results: tuple[Any, Any, Any]) -> None:
    assert [result["gather_objects"] for result in results] == [[0], [0, 1], []]


def test_ranks_wait_for_the_first_without_a_timeout(results: tuple[Any, Any, Any]) -> None:
    assert [result["late"] for result in results[1:]] == ["late", "late"]


def test_ranks_share_the_environments_and_steps_of_a_run() -> None:
    cfg = load_config(overrides=["env.num_envs=6", "train.total_timesteps=1000", "train.seed=5"])
    shares = [share_of_rank(cfg, Ranks(rank, 3)) for rank in range(3)]
    assert [share.env.num_envs for share in shares] == [2, 2, 2]
    assert [share.train.total_timesteps for share in shares] == [333, 333, 333]
    assert len({share.train.seed for share in shares}) == 3
    assert shares[0].train.seed == 5
    assert cfg.env.num_envs == 6, "the configuration of the whole run is unchanged"


def test_environments_that_cannot_be_shared_are_refused() -> None:
    cfg = load_config(overrides=["env.num_envs=7"])
    with pytest.raises(ConfigError, match=r"env.num_envs = 7 cannot be shared evenly by the 2 processes .* is 8\."):
        share_of_rank(cfg, Ranks(0, 2))


def test_one_device_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"use train.device=cuda"), joined_ranks("cuda:0"):
        pass
    with pytest.raises(ConfigError, match=r"no CUDA device: there are 1"), joined_ranks("cuda"):
        pass


def torchrun(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, "--master-port", str(free_port()), *TRAIN, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=THIS_CHECKOUT, timeout=300)


@pytest.mark.slow
def test_torchrun_learns(tmp_path: Path) -> None:
    """There are one run folder and one summary, and a resumed run ends with the same parameters as a whole one."""
    options = ["env.horizon=20", "env.num_envs=64", f"logger.base_dir={tmp_path}", "logger.progress=false"]
    result = torchrun(*options, "train.total_timesteps=20000", "logger.run_name=whole")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    summary = json.loads(result.stdout)
    assert summary["success_rate"] >= 0.95
    assert summary["processes"] == 2
    assert summary["total_timesteps"] == 14 * 64 * 22
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    half = ["train.lr_schedule=constant", *options]
    for steps, more in ((10000, ["logger.run_name=cut"]), (20000, [f"resume={tmp_path / 'cut'}"])):
        result = torchrun(*half, f"train.total_timesteps={steps}", *more)
        assert result.returncode == 0, result.stderr
    result = torchrun(*half, "train.total_timesteps=20000", "logger.run_name=through")
    last = [load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["agent"] for name in ("cut", "through")]
    assert all(torch.equal(value, last[1][name]) for name, value in last[0].items())


@pytest.mark.slow
def test_all_ranks_stop_at_the_score_of_the_first(tmp_path: Path) -> None:
    options = ["env.horizon=5", "env.num_envs=64", f"logger.base_dir={tmp_path}", "logger.progress=false"]
    evaluated = ["logger.eval_every=2", "logger.eval_episodes=50", "train.stop_at=0.5", "logger.run_name=run"]
    stopped = torchrun(*options, *evaluated, "train.total_timesteps=100000")
    assert stopped.returncode == 0, stopped.stderr
    summary = json.loads(stopped.stdout)
    assert summary["stopped_early"]
    assert summary["total_updates"] < 100
    lines = (tmp_path / "run" / "logs" / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + summary["total_updates"]
    for name in ("last", "best"):
        assert load_checkpoint(tmp_path / "run" / "checkpoints" / f"{name}.pt")["update"] == summary["total_updates"]
    again = torchrun(*options, *evaluated, "train.total_timesteps=100000", "resume=auto")
    assert json.loads(again.stdout) == summary


@pytest.mark.slow
def test_a_mistake_is_reported_once(tmp_path: Path) -> None:
    result = torchrun("env.num_envs=7", f"logger.base_dir={tmp_path}")
    assert result.returncode != 0
    assert [line for line in result.stderr.splitlines() if "error: " in line] == [
        "error: env.num_envs = 7 cannot be shared evenly by the 2 processes of this run; the nearest that can is 8."
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all(tmp_path: Path, number: int) -> None:
    """Send SIGINT to all processes, as Ctrl-C in a terminal does, or SIGTERM to the launcher alone."""
    options = ["env.horizon=200", "train.total_timesteps=9999999", f"logger.base_dir={tmp_path}", "logger.run_name=run"]
    command = [*TORCHRUN, "--master-port", str(free_port()), *TRAIN, *options, "logger.progress=false"]
    running = subprocess.Popen(
        command, env=THIS_CHECKOUT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "last.pt").exists():
        assert running.poll() is None
        assert time.monotonic() < end
        time.sleep(0.2)
    time.sleep(1.0)
    os.killpg(running.pid, number) if number == signal.SIGINT else running.send_signal(number)
    _, stderr = running.communicate(timeout=30)
    assert "goes on from the last checkpoint" in stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["is_interrupted"]
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)


BROKEN = """
import os
import sys

import torch

from cyborg_torchrl.envs import DelayedCueEnv
from cyborg_torchrl.cli.train import main

advance, calls = DelayedCueEnv.advance, []


def broken(env, action):
    result = advance(env, action)
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 20:
        value = result.reward.clone()
        value[1] = torch.nan
        result = result._replace(reward=value)
    return result


DelayedCueEnv.advance = broken
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_nan_in_one_process_ends_all_and_is_located(tmp_path: Path) -> None:
    """The other process, which waits for gradients, is ended too. The last good checkpoint is kept."""
    program = tmp_path / "broken.py"
    program.write_text(BROKEN)
    options = ["env.horizon=5", "env.num_envs=8", "train.n_steps=7", "train.total_timesteps=5600"]
    options += ["train.num_minibatches=2"]
    options += [f"logger.base_dir={tmp_path}", "logger.run_name=run", "logger.progress=false", "logger.eval_episodes=0"]
    command = [*TORCHRUN, "--master-port", str(free_port()), str(program), *options]
    done = subprocess.run(command, env=THIS_CHECKOUT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line and "error_file" not in line]
    assert line.startswith("process 1: error: 'next/reward' is nan in environment 1 at step 5 of the rollout (update 3")
    assert str(tmp_path / "run" / "dumps" / "update_00000003.pt") in line
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["trainer"]["num_updates"] == 2
