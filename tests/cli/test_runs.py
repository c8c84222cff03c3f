"""Whole runs: their output, their files, and their end."""

import csv
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import pytest
import torch

from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.envs.signals import interrupts_deferred
from cyborg_torchrl.memory_benchmarks import pseudo_mamba_memory_suite
from cyborg_torchrl.training.checkpoint import load_checkpoint, save_checkpoint
from cyborg_torchrl.training.experiment import run_experiment

ROOT = Path(__file__).parents[2]
SMALL = ["env.horizon=5", "train.total_timesteps=1000", "logger.eval_episodes=64", "train.n_epochs=2"]
SUMMARY = {
    "task", "backbone", "horizon", "num_envs", "total_timesteps", "seed", "success_rate", "mean_reward",
    "steps_per_second", "total_updates", "total_seconds", "peak_rss_mb",
}  # fmt: skip


THIS_CHECKOUT = {**os.environ, "PYTHONPATH": str(ROOT)}
"""Environment variables that select the package of this checkout over an installed one."""


def enable_interrupts() -> None:
    """Handle SIGINT and SIGHUP by default. A shell's & or nohup may have disabled them for the tests."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def with_controlling_terminal() -> None:
    enable_interrupts()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def example(*arguments: str, **options):
    command = [sys.executable, "-m", "cyborg_torchrl", "train", *arguments]
    options = {"env": THIS_CHECKOUT, **options}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **options)


def test_a_reader_that_leaves_ends_a_command_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "cyborg_torchrl", "train", "--print-config"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=THIS_CHECKOUT) as process:
        process.stdout.close()  # as `head` does
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_run_writes_its_files(tmp_path):
    result = example(*SMALL, f"logger.base_dir={tmp_path}", "logger.run_name=run")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary.keys() >= SUMMARY
    assert summary["total_updates"] == 2
    assert summary["total_timesteps"] == 2 * 64 * 7
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert {"versions", "commit", "seed", "machine"} <= manifest.keys()
    assert manifest["observations"] == "observation [6] as numbers"
    assert "observations: observation [6] as numbers\n" in result.stderr
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0] or manifest["versions"]["torch"]
    with (tmp_path / "run" / "logs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["steps"]) for row in rows] == [448, 896]
    assert all(float(row["ratio_error"]) <= 1e-5 for row in rows)
    assert list((tmp_path / "run" / "logs").glob("events.out.tfevents.*"))
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["trainer"]["num_steps"] == 896
    assert (tmp_path / "run" / "checkpoints" / "best.pt").exists()
    # the written configuration can be loaded
    again = load_config(str(tmp_path / "run" / "config.yaml"))
    assert again.env.horizon == 5


def test_bad_input_ends_in_one_line():  # tests/config/test_malformed_configs.py has many more, in one process
    result = example("backbone=gruu")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not result.stdout


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    options = [*SMALL, f"logger.base_dir={tmp_path}/file", "logger.progress=false"]
    with pytest.raises(ConfigError, match=r"logger.base_dir: cannot write to '.*file/.*' \(Not a directory\)"):
        run_experiment(load_config(overrides=options))


def test_a_taken_run_name_is_refused(tmp_path):
    options = [*SMALL, f"logger.base_dir={tmp_path}", "logger.run_name=run", "logger.progress=false"]
    run_experiment(load_config(overrides=options))
    with pytest.raises(ValueError, match="choose another run name"):
        run_experiment(load_config(overrides=options))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_saves_its_updates(tmp_path, number):
    command = [sys.executable, "-m", "cyborg_torchrl", "train", "env.horizon=50", "train.total_timesteps=100000000"]
    command += [f"logger.base_dir={tmp_path}", "logger.run_name=run"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=THIS_CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=enable_interrupts,
    )
    checkpoint = tmp_path / "run" / "checkpoints" / "last.pt"
    deadline = time.monotonic() + 300  # a busy machine imports slowly
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    summary = json.loads(out.splitlines()[-1])
    assert summary["is_interrupted"]
    assert summary["total_updates"] >= 1
    assert summary["total_timesteps"] == summary["total_updates"] * 64 * 52, "whole updates only"
    assert summary["eval_actions"] is None, "there is no evaluation"
    assert load_checkpoint(checkpoint)["agent"]


PROCESSES = ["--config", "public_benchmark", "env=gymnasium", "env.id=CartPole-v1", "env.num_envs=4", "env.workers=2"]


@pytest.mark.parametrize("options", [["env.horizon=50"], PROCESSES], ids=["one", "processes"])
def test_a_closed_terminal_ends_a_run_as_an_interrupt_does(options, tmp_path):
    command = [sys.executable, "-m", "cyborg_torchrl", "train", *options, "train.total_timesteps=100000000"]
    command += [f"logger.base_dir={tmp_path}", "logger.run_name=run"]
    terminal, shown = pty.openpty()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=THIS_CHECKOUT,
        stdin=shown,
        stdout=shown,
        stderr=shown,
        start_new_session=True,
        preexec_fn=with_controlling_terminal,
    )
    os.close(shown)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.pt"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 2**16)  # unread output would block the run
    os.close(terminal)
    assert process.wait(timeout=300) == 130
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["is_interrupted"]


@pytest.fixture
def short_path():
    """Return a folder for sockets, whose paths have at most 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("send", "number"),
    [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGTERM), (os.killpg, signal.SIGINT)],
    ids=["one", "all", "all of a terminal"],
)
def test_an_interrupt_while_processes_start_leaves_nothing(send, number, tmp_path, short_path):
    folder, base = short_path, tmp_path / "runs"
    command = [sys.executable, "-m", "cyborg_torchrl", "train", "env=gymnasium", "env.id=CartPole-v1", "env.workers=2"]
    process = subprocess.Popen(
        [*command, f"logger.base_dir={base}"],
        cwd=ROOT,
        env={**THIS_CHECKOUT, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=enable_interrupts,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 300
    # multiprocessing's two helper processes; the second one imports for some time
    while len(children.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    send(process.pid, number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert err == "interrupted before training began\n"
    assert not out
    assert not list(folder.iterdir())
    assert not list(base.glob("*"))


def test_an_interrupt_waits_until_a_block_is_done() -> None:
    done = []

    def work() -> None:
        with interrupts_deferred():
            signal.raise_signal(signal.SIGINT)
            done.append("all of it")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        work()  # an ignored signal stays ignored
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["all of it"] * 2


def test_an_interrupt_has_priority_over_the_error_that_it_causes() -> None:
    def work() -> None:
        with interrupts_deferred():
            signal.raise_signal(signal.SIGTERM)
            raise EOFError("another process received the signal too")

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_same_seed_gives_the_same_parameters_bit_for_bit(tmp_path):
    states = []
    for name in ("one", "two", "other"):
        seed = 1 if name == "other" else 0
        options = [*SMALL, f"logger.base_dir={tmp_path}", f"logger.run_name={name}", f"train.seed={seed}"]
        run_experiment(load_config(overrides=[*options, "logger.progress=false"]))
        states.append(load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["agent"])
    one, two, other = states
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_the_suite_maps_the_flags(tmp_path, capsys):
    flags = "--task delayed_cue --backbone gru --horizon 4 --num-envs 16 --total-timesteps 300 --device auto --seed 2"
    more = f"--run-name r --base-dir {tmp_path} --eval-episodes 32 train.n_epochs=1 logger.progress=false"
    assert pseudo_mamba_memory_suite.main([*flags.split(), *more.split()]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    figures = {key: summary[key] for key in ("task", "backbone", "horizon", "num_envs", "seed", "eval_episodes")}
    assert figures == {
        "task": "delayed_cue",
        "backbone": "gru",
        "horizon": 4,
        "num_envs": 16,
        "seed": 2,
        "eval_episodes": 32,
    }
    assert summary["total_timesteps"] == 3 * 16 * 6
    assert (tmp_path / "r" / "summary.json").exists()


def test_checkpoints_are_whole_or_refused(tmp_path):
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"agent": {"w": torch.ones(3)}})
    assert torch.equal(load_checkpoint(path)["agent"]["w"], torch.ones(3))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(path)
    torch.save({"something": 1}, path)
    with pytest.raises(ValueError, match="not a checkpoint of cyborg_torchrl"):
        load_checkpoint(path)
    torch.save({"format": "cyborg_torchrl.checkpoint", "version": 99}, path)
    with pytest.raises(ValueError, match="version 99"):
        load_checkpoint(path)
    assert os.listdir(tmp_path) == ["x.pt"]
