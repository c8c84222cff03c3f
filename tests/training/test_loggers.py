"""Metric backends: the files of the real packages, compared to metrics.csv."""

from __future__ import annotations

import csv
import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.registry import UnavailableError
from cyborg_torchrl.training import loggers
from cyborg_torchrl.training.experiment import run_experiment

TINY = (
    "env.horizon=4", "env.num_envs=8", "train.total_timesteps=100", "train.n_epochs=1", "logger.eval_episodes=0",
    "logger.tensorboard=false", "logger.progress=false", "logger.project=memory",
)  # fmt: skip
EVALUATED = ("logger.eval_every=1", "logger.eval_every_episodes=8")


def run(folder: Path, backend: str, name: str = "r", *more: str) -> list[dict[str, str]]:
    """Train, and return the rows of metrics.csv."""
    where = [f"logger.base_dir={folder}", f"logger.run_name={name}", f"logger.backends=[{backend}]"]
    run_experiment(load_config(overrides=[*TINY, *where, *more]))
    with (folder / name / "logs" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def wandb_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a W&B file: LevelDB's log format after a header of 7 bytes."""
    at, record = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # too short for a header: the rest of a block is unused
            at += left
            continue
        size, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


def test_wandb_keeps_every_metric_at_its_step(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_SILENT", "true")
    rows = run(tmp_path, "wandb", "r", "logger.offline=true", "train.seed=3", *EVALUATED)
    assert all(row["eval/success_rate"] for row in rows)
    (file,) = (tmp_path / "r").rglob("*.wandb")
    more = ("logger.offline=true", "train.seed=3", "train.total_timesteps=200", "logger.resume=auto")
    assert len(run(tmp_path, "wandb", "r", *more)) == 4
    (again,) = set((tmp_path / "r").rglob("*.wandb")) - {file}
    assert again.name == file.name, "W&B must continue the same run"
    known = json.loads((tmp_path / "r" / "logs" / "backends.json").read_text())["wandb"]
    history, config, names = [], {}, set()
    for data in wandb_records(file.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("history"):
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            history.append({key: json.loads(value) for key, value in items.items()})
        for update in (record.config.update, record.run.config.update):
            config |= {item.key: json.loads(item.value_json) for item in update}
        if record.HasField("run"):
            names.add((record.run.project, record.run.display_name, record.run.run_id))
    assert [entry["step"] for entry in history] == [int(row["steps"]) for row in rows]
    for entry, row in zip(history, rows, strict=True):
        assert entry["kl_approx"] == pytest.approx(float(row["kl_approx"]))
        assert {name for name, value in row.items() if value} <= set(entry)
    assert config["train"]["seed"] == 3
    assert names == {("memory", "r", known)}


@pytest.mark.filterwarnings("ignore:.*noload.*")  # MLflow's use of SQLAlchemy
def test_mlflow_keeps_every_metric_at_its_step(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient

    written = {
        name: run(tmp_path, "mlflow", name, f"train.seed={seed}", *EVALUATED)
        for seed, name in enumerate(("one", "two"))
    }
    assert all(row["eval/success_rate"] for rows in written.values() for row in rows)
    # resume one of them: MLflow must continue the same run
    written["one"] = run(tmp_path, "mlflow", "one", "train.total_timesteps=200", "logger.resume=auto", *EVALUATED)
    assert len(written["one"]) == 4
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [known for known in client.search_experiments() if known.name == "memory"]
    runs = client.search_runs([experiment.experiment_id])
    assert {known.info.run_name: known.data.params["train.seed"] for known in runs} == {"one": "0", "two": "1"}
    assert {known.info.status for known in runs} == {"FINISHED"}
    for known in runs:
        rows = written[known.info.run_name]
        for name in (name for name, value in rows[0].items() if value):
            history = client.get_metric_history(known.info.run_id, name)
            logged = {entry.step: entry.value for entry in history}
            assert logged == pytest.approx({int(row["steps"]): float(row[name]) for row in rows}, nan_ok=True)


@pytest.mark.filterwarnings("ignore:.*noload.*")
def test_the_evaluation_is_logged_to_all_backends(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = run(tmp_path, "mlflow", "r", "logger.eval_episodes=20", "logger.tensorboard=true")
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [known for known in client.search_experiments() if known.name == "memory"]
    (known,) = client.search_runs([experiment.experiment_id])
    events = EventAccumulator(str(tmp_path / "r" / "logs")).Reload()
    for name, key in (("success_rate", "success_rate"), ("mean_reward", "mean_reward"), ("episodes", "eval_episodes")):
        (entry,) = client.get_metric_history(known.info.run_id, f"eval/{name}")
        (point,) = events.Scalars(f"eval/{name}")
        assert (entry.value, entry.step) == (pytest.approx(summary[key]), summary["total_timesteps"])
        assert (point.value, point.step) == (pytest.approx(summary[key]), summary["total_timesteps"])
    assert not any(value for row in rows for name, value in row.items() if name.startswith("eval/"))


def test_a_missing_package_is_one_line_and_no_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"needs: pip install 'cyborg-torchrl\[mlflow\]'"):
        run(tmp_path, "mlflow")
    assert not list(tmp_path.iterdir())


def test_a_mistyped_backend_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"unknown logger.backends 'wandbb': did you mean 'wandb'\?"):
        load_config(overrides=["logger.backends=[wandbb]"])


def test_a_backend_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    with pytest.raises(ConfigError, match=r"^logger.backends: mlflow cannot be used \(.*\)\.$"):
        run(tmp_path, "mlflow", "r", "logger.tracking_uri=nowhere://x")


class Server:
    """A backend that stops taking metrics."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if self.taken:
            raise ConnectionError("the server\nis gone")
        self.taken.append(step)

    def close(self) -> None:
        raise AssertionError("a dropped backend is not closed")


def test_training_continues_without_its_server(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    server = Server()
    monkeypatch.setitem(loggers.KINDS, "wandb", lambda *_: loggers.Backend(server, "1", server.close))
    with pytest.warns(UserWarning, match="wandb takes no more metrics: the server is gone"):
        rows = run(tmp_path, "wandb")
    assert len(rows) == 2
