"""The speed command at a size that says nothing about speed: what is run, and how rows come about."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.speed.__main__ import main, memory_of
from benchmarks.speed.baselines import LoopPPO
from benchmarks.speed.measure import WARM_UP, Timing, rows_of, take_turns
from benchmarks.speed.subjects import Case, collection

SMALL = [
    *["--num-envs", "4", "--horizon", "5", "--collected", "8"],
    *["--width", "8", "--repeats", "1", "--backbones", "lru"],
]


def test_ratios_are_medians_of_neighbours() -> None:
    timings = {
        "ours": [Timing(1.0, 1.0, 10), Timing(2.0, 1.0, 10), Timing(1.0, 1.0, 10)],
        "theirs": [Timing(3.0, 2.0, 10), Timing(4.0, 2.0, 10), Timing(8.0, 2.0, 20)],
    }
    ours, theirs = rows_of(timings, {"part": "x"})
    assert (ours["first_is_times_as_fast"], ours["steps_per_second"]) == (1.0, 10.0)
    assert theirs["first_is_times_as_fast"] == pytest.approx(3.0)  # of 3, 2 and 4
    assert theirs["first_is_times_as_fast_by_cpu"] == pytest.approx(2.0)  # of 2, 2 and 1
    assert theirs["wall_us_per_step"] == pytest.approx(4e5)


def test_turns_are_taken_and_warming_up_is_not_counted() -> None:
    order: list[str] = []

    def subject(name: str):
        return name, lambda: len(order.append(name) or order)

    timings = take_turns([subject("a"), subject("b")], 2)
    assert order == ["a", "b"] * (WARM_UP + 2)
    assert [len(runs) for runs in timings.values()] == [2, 2]


def test_all_collectors_take_the_same_steps() -> None:
    case = Case("lru", 3, 4, width=8, n_steps=12)
    assert [run() for _, run in collection(case)] == [36] * 4


def test_the_raw_loop_samples_the_policy_and_obeys_the_task() -> None:
    raw = dict(collection(Case("lru", 50, 1, width=8, n_steps=30)))["raw PyTorch loop"]
    raw()
    raw()  # goes on in the middle of episodes
    assert raw.ends[2::3].all() or raw.ends[0::3].all()
    assert raw.ends.float().mean().item() == pytest.approx(1 / 3)
    torch.testing.assert_close(raw.log_probs.exp().mean(), torch.tensor(0.25), atol=0.02, rtol=0)
    asked = raw.rewards[raw.ends]
    assert set(asked.tolist()) == {-1.0, 1.0}
    assert asked.mean().item() == pytest.approx(-0.5, abs=0.15)  # a quarter is right by chance


@pytest.mark.learning
def test_the_loop_beside_us_learns_what_is_short() -> None:
    loop = LoopPPO(Case("lstm", 64, 2, width=32, n_steps=32))
    for _ in range(150):
        loop()
    shown, _ = loop.task.restart()
    hidden, state = torch.zeros(0), (torch.zeros(1, 64, 32), torch.zeros(1, 64, 32))
    with torch.no_grad():
        for _ in range(4):
            hidden, state = loop._remember(loop.encoder(shown)[None], torch.zeros(1, 64), state)
            shown, success, _, _ = loop.task.advance(loop.policy(hidden[0]).argmax(-1))
    assert success.mean() > 0.9


PARTS = ["collection", "processes", "update", "end_to_end", "horizons"]


@pytest.mark.parametrize("parts", [["collection", "end_to_end"], pytest.param(PARTS, marks=pytest.mark.slow)], ids=len)
def test_the_command_writes_what_it_measured(parts: list[str], tmp_path, capsys) -> None:
    pytest.importorskip("sb3_contrib")
    path, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    options = ["--parts", *parts, "--horizons", "5", "--output", str(path), "--plot", str(plot)]
    assert main([*SMALL, *options]) == 0
    written = json.loads(path.read_text())
    assert {row["part"] for row in written["rows"]} == set(parts)
    assert written["machine"]["versions"]["torch"] == torch.__version__
    subjects = {row["subject"] for row in written["rows"] if row["part"] == "end_to_end"}
    theirs = {"sb3-contrib RecurrentPPO", "sb3-contrib RecurrentPPO, one LSTM", "CleanRL-style LSTM"}
    assert subjects == {"ours, lru", *theirs}
    assert all(row["steps_per_second"] > 0 for row in written["rows"])
    assert plot.stat().st_size > 10_000
    assert "sb3-contrib RecurrentPPO" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own() -> None:
    before = memory_of(Case("lru", 4, 5, width=8))
    ballast = torch.ones(2**28)  # 1 GiB of this process, which the other must not count
    assert 100 < memory_of(Case("lru", 4, 5, width=8)) < before + 200 < 4000
    del ballast
