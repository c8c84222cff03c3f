"""Every command refuses an unusable checkpoint with one line and exit code 2."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from cyborg_torchrl.cli.main import main
from cyborg_torchrl.config import load_config
from cyborg_torchrl.training.checkpoint import FORMAT, VERSION

Content = dict[str, Any]


class RunsCode:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def with_(content: Content, **changes: Any) -> bytes:
    """Return the checkpoint with changed entries; None removes an entry."""
    return saved({name: value for name, value in {**content, **changes}.items() if value is not None})


def with_config(content: Content, **changes: Any) -> bytes:
    return with_(content, config={**content["config"], **changes})


def with_agent(content: Content, change: Callable[[Any], Any]) -> bytes:
    return with_(content, agent={name: change(value) for name, value in content["agent"].items()})


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "hello")
    return file.getvalue()


def garbled(file: bytes) -> bytes:
    """Return a file in which every hundredth byte of the pickled structure, its first part, is changed."""
    return bytes(byte ^ 0x5A if i % 100 == 50 and i < 4000 else byte for i, byte in enumerate(file))


CASES: dict[str, tuple[Callable[[Content, Path], bytes], str]] = {
    "empty": (lambda content, marker: b"", "not a readable checkpoint: it is empty"),
    "one byte": (lambda content, marker: b"P", "not a readable checkpoint: it is no file of torch"),
    "cut after the magic number": (
        lambda content, marker: saved(content)[:4],
        "not a readable checkpoint: it is cut off",
    ),
    "cut in the middle": (
        lambda content, marker: saved(content)[: len(saved(content)) // 2],
        "not a readable checkpoint: it is cut off",
    ),
    "cut before its end": (lambda content, marker: saved(content)[:-30], "not a readable checkpoint: it is cut off"),
    "garbled": (lambda content, marker: garbled(saved(content)), "not a readable checkpoint"),
    "text": (lambda content, marker: b"backbone: gru\n" * 50, "not a readable checkpoint: it is no file of torch"),
    "bytes": (lambda content, marker: bytes(range(256)) * 20, "not a readable checkpoint: it is no file of torch"),
    "a zip file": (lambda content, marker: zipped(), "not a readable checkpoint: it is damaged"),
    "a pickle that runs code": (
        lambda content, marker: pickle.dumps(RunsCode(marker)),
        "not a readable checkpoint: it is no file of torch",
    ),
    "a torch file that runs code": (
        lambda content, marker: saved(RunsCode(marker)),
        "it holds other things than tensors",
    ),
    "code within a checkpoint": (
        lambda content, marker: with_(content, more=RunsCode(marker)),
        "it holds other things than tensors",
    ),
    "a tensor": (lambda content, marker: saved(torch.zeros(3)), "not a checkpoint of cyborg_torchrl"),
    "parameters alone": (lambda content, marker: saved(content["agent"]), "not a checkpoint of cyborg_torchrl"),
    "a list": (lambda content, marker: saved([content]), "not a checkpoint of cyborg_torchrl"),
    "another format": (lambda content, marker: with_(content, format="others"), "not a checkpoint of cyborg_torchrl"),
    "no version": (lambda content, marker: with_(content, version=None), "version"),
    "a newer version": (lambda content, marker: with_(content, version=VERSION + 41), f"version {VERSION + 41}"),
    "a version that is none": (lambda content, marker: with_(content, version="new"), "version"),
    "no configuration": (lambda content, marker: with_(content, config=None), "no configuration"),
    "a configuration that is none": (lambda content, marker: with_(content, config=[1, 2]), "no configuration"),
    "tensors in the configuration": (
        lambda content, marker: with_config(content, train={"seed": torch.zeros(2)}),
        "configuration that cannot be read",
    ),
    "an unknown backbone": (lambda content, marker: with_config(content, backbone={"name": "gruu"}), "'gru'"),
    "a backbone without a name": (lambda content, marker: with_config(content, backbone={"name": 5}), "backbone '5'"),
    "an unknown key": (lambda content, marker: with_config(content, train={"seeed": 1}), "'train.seed'"),
    "a value of a wrong type": (lambda content, marker: with_config(content, train={"seed": "often"}), "seed"),
    "a group that is a number": (lambda content, marker: with_config(content, train=5), "TrainConfig"),
    "an impossible value": (lambda content, marker: with_config(content, encoder={"features": -3}), "features"),
    "no agent": (lambda content, marker: with_(content, agent=None), "holds no agent"),
    "an agent that is none": (lambda content, marker: with_(content, agent=[1]), "do not fit"),
    "an agent without parameters": (lambda content, marker: with_(content, agent={}), "do not fit"),
    "parameters of another shape": (
        lambda content, marker: with_agent(content, lambda value: value.new_zeros(*value.shape, 2)),
        "do not fit",
    ),
    "parameters that are no tensors": (lambda content, marker: with_agent(content, lambda value: "many"), "do not fit"),
    "parameters of another backbone": (
        lambda content, marker: with_config(content, backbone={"name": "lstm"}),
        "do not fit",
    ),
    "parameters that are not finite": (
        lambda content, marker: with_agent(content, lambda value: value * torch.nan),
        "no finite numbers",
    ),
}


@pytest.fixture(scope="module")
def content() -> Content:
    from cyborg_torchrl.training.builders import build_agent, build_env

    cfg = load_config(overrides=["backbone=gru", "env.horizon=4", "env.num_envs=2"])
    agent = build_agent(cfg, build_env(cfg))
    config: Any = OmegaConf.to_container(cfg)
    return {"format": FORMAT, "version": VERSION, "config": config, "agent": agent.state_dict()}


def refusal(command: str, path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Pass a file to a command. Return the line of its error."""
    output = path.parent / "agent.pt2"
    options = {"evaluate": ["--episodes", "2"], "play": ["--episodes", "1"], "export": ["--output", str(output)]}
    assert main([command, str(path), *options[command]]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert not output.exists()
    return lines[0]


@pytest.mark.parametrize("command", ["evaluate", "play", "export"])
@pytest.mark.parametrize("case", CASES)
def test_a_malformed_checkpoint_is_refused_with_one_line(
    case: str, command: str, content: Content, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = CASES[case]
    path, marker = tmp_path / "agent.pt", tmp_path / "code-has-run"
    path.write_bytes(make(content, marker))
    assert message in refusal(command, path, capsys)
    assert not marker.exists()


@pytest.mark.parametrize("command", ["evaluate", "play", "export"])
@pytest.mark.parametrize("kind", ["nothing", "an empty folder", "a folder in its place"])
def test_a_path_without_a_file_is_refused(
    kind: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    if kind != "nothing":
        path.mkdir()
    if kind == "a folder in its place":
        (path / "checkpoints" / "last.pt").mkdir(parents=True)
    assert "give a run's folder" in refusal(command, path, capsys)


def test_the_unchanged_checkpoint_is_accepted(
    content: Content, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "agent.pt"
    path.write_bytes(saved(content))
    assert main(["evaluate", str(path), "--episodes", "2", "--json"]) == 0
    assert capsys.readouterr().out.startswith("{")
