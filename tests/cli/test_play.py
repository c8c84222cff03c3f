"""Films show what the environment showed; text says what happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from cyborg_torchrl.cli.main import main
from cyborg_torchrl.cli.playback import play
from cyborg_torchrl.envs import DelayedCueEnv
from cyborg_torchrl.envs.rendering import action_names, picture
from cyborg_torchrl.training.loading import build_acting_env, load_agent

Save = Callable[..., Path]


def test_text(save_trained: Save, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_trained("env.horizon=8", "backbone=gru")
    assert main(["play", str(path), "--episodes", "2", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("episode")] == ["episode 1", "episode 2"]
    # the cue, the first blank step, seven more of them, the query, and the end
    first = lines[1 : lines.index("episode 2")]
    assert len(first) == 6
    assert first[1].split()[0] == "1"
    assert first[3].strip() == "... 7 more with the same observation and no reward"
    assert first[4].split()[0] == "10"
    assert first[4].split("observation ")[1].startswith("[0 0 0 0 0 1] -> ")
    reward = float(first[4].split(", ")[-1])
    assert reward in (-1.0, 1.0)
    assert first[5].strip() == f"terminated after 10 steps: return {reward:g}, success {(reward + 1) / 2:g}"


def test_every_step(save_trained: Save, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_trained("env.horizon=8", "backbone=gru")
    assert main(["play", str(path), "--episodes", "1", "--full", "--max-steps", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["1", "2", "3", "4", "5"]
    assert lines[-1].strip() == "cut after 5 steps: return 0, success 0"


def test_it_plays_what_evaluation_plays(save_trained: Save) -> None:
    from cyborg_torchrl.training.evaluation import evaluate

    cfg, agent, _ = load_agent(save_trained("env=tmaze", "env.horizon=6", "backbone=gru"))
    env = build_acting_env(cfg, agent, num_envs=1, seed=5)
    frames = list(play(agent, env, 4))
    result = evaluate(agent, build_acting_env(cfg, agent, num_envs=1, seed=5), 4)
    ends = [frame for frame in frames if not frame.action]
    assert [frame.total for frame in ends] == pytest.approx(result.returns.tolist())
    assert [frame.step for frame in ends] == result.lengths.tolist()


def test_a_film_of_crafter(save_trained: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("crafter")
    image = pytest.importorskip("PIL.Image")
    path = save_trained("env=treechop", "env.num_envs=1", "env.max_episode_steps=7", "encoder.convolutions=nature")
    film = tmp_path / "play.gif"
    assert main(["play", str(path), "--episodes", "2", "--output", str(film), "--size", "128"]) == 0
    with image.open(film) as frames:
        assert frames.n_frames == 2 * (7 + 1)
        assert frames.size == (128, 128 + 40)
        shown = np.asarray(frames.convert("RGB"))[:128, :128]
    cfg, agent, _ = load_agent(path)
    env = build_acting_env(cfg, agent, num_envs=1, seed=cfg.train.seed + 1_000_003)
    pixels = env.reset()["pixels"][0].numpy().repeat(2, 0).repeat(2, 1)
    assert np.abs(shown.astype(int) - pixels).mean() < 8  # a palette of 128 colours


def test_a_film_of_what_is_rendered(save_trained: Save, tmp_path: Path) -> None:
    pytest.importorskip("minigrid")
    pytest.importorskip("imageio_ffmpeg")
    imageio = pytest.importorskip("imageio.v2")
    path = save_trained("env=minigrid", "env.num_envs=2", "env.workers=2", "train.n_steps=16")
    film = tmp_path / "play.mp4"
    assert main(["play", str(path), "--episodes", "1", "--output", str(film), "--max-steps", "6"]) == 0
    with imageio.get_reader(film) as frames:
        assert frames.count_frames() == 7
        shape = frames.get_data(0).shape
    assert shape[1] % 2 == 0
    assert shape[2] == 3


def test_what_has_no_pictures_says_so(save_trained: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film = tmp_path / "play.gif"
    assert main(["play", str(save_trained("env.horizon=3")), "--output", str(film)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == "error: 'delayed_cue' shows no pictures: leave --output out, for the steps as text."
    assert not film.exists()


def test_actions_have_names(save_trained: Save, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("minigrid")
    cfg, agent, _ = load_agent(save_trained("env=minigrid", "env.num_envs=1", "train.n_steps=16"))
    env = build_acting_env(cfg, agent, num_envs=1, seed=0)
    assert action_names(env) == ["left", "right", "forward", "pickup", "drop", "toggle", "done"]
    assert picture(env, env.reset()) is None  # nobody asked it to render
    assert next(play(agent, env, 1)).action in (action_names(env) or [])


@pytest.mark.parametrize("shape", [(36, 40, 3), (3, 36, 40), (36, 40, 12), (36, 40), (4, 3, 36, 40)])
def test_pictures_of_every_layout(shape: tuple[int, ...]) -> None:
    pixels = torch.randint(0, 256, (1, *shape), dtype=torch.uint8)
    shown = picture(DelayedCueEnv(1), TensorDict({"pixels": pixels}, [1]))
    one = pixels[0].numpy()
    expected = {
        (36, 40, 3): lambda: one,
        (3, 36, 40): lambda: one.transpose(1, 2, 0),
        (36, 40, 12): lambda: one[..., -3:],
        (36, 40): lambda: np.stack([one] * 3, -1),
        (4, 3, 36, 40): lambda: one[-1].transpose(1, 2, 0),
    }[shape]()
    assert shown is not None
    assert np.array_equal(shown, expected)
