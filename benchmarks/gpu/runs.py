"""Training runs on a GPU: speed, success, and equal parameters when a run is repeated."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.kernels import steps_and_sequences
from benchmarks.gpu.timing import Row, reason_of
from cyborg_torchrl.memory_benchmarks.pseudo_mamba_memory_suite import main as suite
from cyborg_torchrl.training.checkpoint import load_checkpoint

Arguments = Sequence[str]
SMOKE = ["--horizon", "5", "--num-envs", "4", "train.n_epochs=2", "train.num_minibatches=2"]
"""Arguments that make a run tiny. Of two values of an option, the last one counts."""
WITHOUT_GRAPHS = ["train.cudagraph=false", "collector.cudagraph=false"]
NOT_EVALUATED = ["--eval-episodes", "0"]
EVALUATED = ["--eval-episodes", "250"]

DEFAULT_RUNS: dict[str, list[str]] = {
    "lru": EVALUATED,
    "lru, without graphs": [*WITHOUT_GRAPHS, *NOT_EVALUATED],
    "gru": ["--backbone", "gru", *NOT_EVALUATED],
    "lstm": ["--backbone", "lstm", *NOT_EVALUATED],
    "mamba": ["--backbone", "mamba", *NOT_EVALUATED],
    "mamba2": ["--backbone", "mamba2", *NOT_EVALUATED],
    "lru, 1,024 environments": ["--num-envs", "1024", "--total-timesteps", "3100000", *NOT_EVALUATED],
    "gru, width 1024, horizon 100": [
        *["--backbone", "gru", "--horizon", "100", "--total-timesteps", "19584", *NOT_EVALUATED],
        *["backbone.hidden_size=1024", "train.n_epochs=4"],
    ],
}  # fmt: skip
"""Variants of the default run. Horizon, environments and steps are those of the suite if they are not given."""
MANY_ENVIRONMENTS = [
    *["--backbone", "lru", "--num-envs", "8192", "--horizon", "100", "--total-timesteps", "3400000"],
    *["backbone.hidden_size=128", *NOT_EVALUATED],
]  # fmt: skip
MISSION = [
    *["--task", "delayed_cue", "--backbone", "mamba_gru", "--horizon", "1000", "--num-envs", "64"],
    *["--total-timesteps", "200000", *EVALUATED],
]  # fmt: skip


def train(arguments: Arguments, folder: Path, name: str) -> Row:
    """Train an agent with the command of the suite. Return its speed, success and ratio error.

    Raises:
        RuntimeError: if the command fails; the message is its last line.
    """
    quiet = ["logger.progress=false", "logger.tensorboard=false"]
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        code = suite([*arguments, "--base-dir", str(folder), "--run-name", name, *quiet])
    if code:
        raise RuntimeError((errors.getvalue().strip().splitlines() or [f"exit code {code}"])[-1])
    summary = json.loads(output.getvalue().splitlines()[-1])
    with (folder / name / "logs" / "metrics.csv").open(newline="") as file:
        updates = list(csv.DictReader(file))
    steps, seconds = ([float(update[key]) for update in updates] for key in ("steps", "seconds"))
    # The first update compiles kernels and captures graphs.
    later = (steps[-1] - steps[0]) / (seconds[-1] - seconds[0]) if len(updates) > 1 else None
    return {
        "steps": summary["total_timesteps"],
        "updates": len(updates),
        "steps_per_second": summary["steps_per_second"],
        "steps_per_second_after_first_update": later,
        "success": summary["success_rate"] if summary["eval_episodes"] else None,
        "eval_episodes": summary["eval_episodes"],
        "ratio_error": max(float(update["ratio_error"]) for update in updates),
        "total_seconds": summary["total_seconds"],
        "is_graph_refused": "cannot be captured" in errors.getvalue(),
    }


def _train_all(runs: dict[str, list[str]], device: torch.device, is_smoke: bool) -> Iterator[Row]:
    for name, arguments in runs.items():
        # 100 steps are some updates of a tiny run.
        tiny = [*SMOKE, "--total-timesteps", "100", "backbone.hidden_size=8"] if is_smoke else []
        command = [*arguments, "--device", str(device), *tiny]
        with tempfile.TemporaryDirectory() as folder:
            try:
                yield {"run": name, "arguments": command, **train(command, Path(folder), "run")}
            except Exception as error:
                yield {"run": name, "arguments": command, "error": reason_of(error)}


def default_runs(device: torch.device, is_smoke: bool) -> Iterator[Row]:
    """Train on the default task, with and without graphs, and with other cores."""
    yield from _train_all(DEFAULT_RUNS, device, is_smoke)


def many_environments(device: torch.device, is_smoke: bool) -> Iterator[Row]:
    """Train on thousands of environments."""
    yield from _train_all({"lru, 8,192 environments": MANY_ENVIRONMENTS}, device, is_smoke)


def mission(device: torch.device, is_smoke: bool) -> Iterator[Row]:
    """Train with the documented command of the suite, on this device."""
    yield from _train_all({"mamba_gru, the command of the suite": MISSION}, device, is_smoke)


def exact(device: torch.device, is_smoke: bool) -> Iterator[Row]:
    """Compare bit by bit: steps and sequences; a run with its repetition, without graphs, and resumed."""
    yield from steps_and_sequences(device, is_smoke)
    for backbone in ("lru",) if is_smoke else ("lru", "gru", "mamba_gru"):
        sizes = SMOKE if is_smoke else ["--horizon", "100", "--num-envs", "64", "train.n_epochs=3"]
        # With a constant rate, half a run begins as the whole run does.
        steps = 28 if is_smoke else 6528
        common = [*sizes, "--backbone", backbone, "--device", str(device), *NOT_EVALUATED]
        common += ["train.lr_schedule=constant", "backbone.hidden_size=8" if is_smoke else "backbone.hidden_size=64"]
        half, whole = (["--total-timesteps", str(n * steps)] for n in (2, 4))
        with tempfile.TemporaryDirectory() as path:
            folder = Path(path)
            first = train([*common, *whole], folder, "first")
            if first["is_graph_refused"]:
                yield {"check": "with graphs", "subject": backbone, "error": "the optimiser step was not captured"}
            train([*common, *whole], folder, "second")
            train([*common, *whole, *WITHOUT_GRAPHS], folder, "without graphs")
            train([*common, *half], folder, "resumed")
            train([*common, *whole, f"resume={folder / 'resumed'}"], folder, "resumed")
            expected = parameters(folder / "first")
            for check, name in {
                "two runs": "second",
                "with and without graphs": "without graphs",
                "resumed run": "resumed",
            }.items():
                yield {"check": check, "subject": backbone, **compared(expected, parameters(folder / name))}


def parameters(folder: Path) -> dict[str, Tensor]:
    """Return the agent's tensors at the end of a run."""
    return load_checkpoint(folder / "checkpoints" / "last.pt")["agent"]


def compared(first: dict[str, Tensor], second: dict[str, Tensor]) -> Row:
    """Return whether two agents are equal bit by bit, and their largest difference."""
    differences = [float((value.double() - second[name].double()).abs().max()) for name, value in first.items()]
    is_equal = all(torch.equal(value, second[name]) for name, value in first.items())
    return {"is_equal": is_equal and first.keys() == second.keys(), "largest_difference": max(differences)}
