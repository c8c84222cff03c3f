"""The page and its command: one file without requests, with every chart in words and numbers, and with every run."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cyborg_torchrl.cli.main import main
from cyborg_torchrl.memory_benchmarks.report.page import build_page
from cyborg_torchrl.memory_benchmarks.report.runs import find_runs

WriteRun = Callable[..., Path]
VOID = {"meta", "link", "br", "line", "img"}
SECTIONS = ["curves", "horizons", "results", "speed", "xray", "runs"]


class Reader(HTMLParser):
    """Collect the elements and the text of a page, and check that elements are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    def values(self, attribute: str) -> list[str]:
        """Return the values of an attribute of all elements."""
        return [value for _, attributes in self.elements if (value := attributes.get(attribute)) is not None]


def write_sweep(base: Path, write: WriteRun) -> Path:
    """Write two tasks, two backbones, three seeds, one of them unfinished; and one backbone at a second horizon."""
    for task in ("delayed_cue", "n_back"):
        for backbone in ("lru", "gru"):
            for seed in range(3):
                name = f"sweep/{task}-{backbone}-{seed}"
                write(base, name, task=task, backbone=backbone, seed=seed, success=seed / 2)
    for seed in range(2):
        write(base, f"sweep/far-{seed}", horizon=100, seed=seed)
    (base / "sweep" / "n_back-gru-2" / "summary.json").unlink()
    return base / "sweep"


@pytest.fixture
def sweep_folder(tmp_path: Path, run_writer: WriteRun) -> Path:
    return write_sweep(tmp_path, run_writer)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, run_writer: WriteRun) -> str:
    folder = write_sweep(tmp_path_factory.mktemp("runs"), run_writer)
    return build_page(find_runs([folder]), "No agent was looked into.")


def test_it_needs_nothing_else(page: str) -> None:
    assert not re.search(r"https?://|//cdn|@import|@font-face", page)
    reader = Reader(page)
    assert not [tag for tag, _ in reader.elements if tag in ("script", "iframe", "object", "embed", "img")]
    assert all(target.startswith(("#", "data:")) for target in (*reader.values("href"), *reader.values("src")))
    assert not re.findall(r"url\((?!#)", page)
    assert "default-src 'none'" in page


def test_every_link_has_a_target_and_every_id_is_unique(page: str) -> None:
    reader = Reader(page)
    ids = reader.values("id")
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in reader.values("href") if target.startswith("#")} <= set(ids)
    assert [name for name in ids if name in SECTIONS] == SECTIONS
    assert {f"run-{i + 1}" for i in range(14)} <= set(ids)


def test_every_chart_is_described_in_words_and_in_numbers(page: str) -> None:
    figures = re.findall(r"<figure>(.*?)</figure>", page, flags=re.DOTALL)
    assert len(figures) == 3 + 1 + 3 + 3  # curves, against the horizon, scores and speed of three tasks
    for figure in figures:
        label = re.search(r'<svg[^>]* aria-label="([^"]+)"', figure)
        assert label
        assert len(label[1]) > 40
        assert re.search(r"<details>.*<tbody.*<td", figure, flags=re.DOTALL)


def cells(page: str, caption: str) -> list[dict[str, str]]:
    """Return the rows of a table, by their headers."""
    table = next(part for part in page.split("<table")[1:] if f"<caption>{caption}" in part)
    headers = re.findall(r"<th [^>]*>(.*?)</th>", table)
    body = table.partition("<tbody")[2].partition("</tbody>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in body.split("<tr")[1:]]
    return [dict(zip(headers, (re.sub("<[^>]+>", "", cell) for cell in row), strict=True)) for row in rows]


def test_results_are_those_of_the_runs(page: str) -> None:
    rows = {(row["task"], row["backbone"]): row for row in cells(page, "Each task and backbone")}
    near = rows["delayed_cue, horizon 10", "lru"]
    assert (near["mean"], near["min"], near["seeds finished"]) == ("0.500", "0.000", "3 of 3")
    assert near["IQM [95 % interval]"].startswith("0.500 [0.000, 1.000")
    assert (near["solved"], near["steps to target"]) == ("partly: 1 of 3 at 0.95", "400")
    assert rows["n_back, horizon 10", "gru"]["seeds finished"] == "2 of 3"
    assert rows["delayed_cue, horizon 100", "lru"]["solved"] == "no: 0 of 2 at 0.95"
    speed = {row["backbone"]: row for row in cells(page, "Speed and memory") if row["task"].startswith("n_back")}
    assert (speed["lru"]["steps / s (median)"], speed["lru"]["range"]) == ("1,001", "1,000 to 1,002")
    assert speed["gru"]["runs"] == "2"


def test_all_tasks_together_need_the_same_seeds_on_each(sweep_folder: Path, page: str, run_writer: WriteRun) -> None:
    assert "No backbone has the same number of finished seeds on each task" in page
    for folder in [*sweep_folder.glob("far-*"), *sweep_folder.glob("*-2")]:
        shutil.rmtree(folder)
    run_writer(sweep_folder, "one-task-alone", backbone="lstm")
    page = build_page(find_runs([sweep_folder]), "")
    assert "so they are not in the table of all tasks: lstm." in page
    rows = cells(page, "All tasks together")
    assert [(row["backbone"], row["tasks"], row["seeds on each"]) for row in rows] == [
        ("gru", "2", "2"),
        ("lru", "2", "2"),
    ]
    assert rows[0]["IQM [95 % interval]"].startswith("0.250 [")


def test_a_run_that_does_not_count_is_shown(page: str) -> None:
    shown = [row for row in cells(page, "Runs") if row["state"] != "finished"]
    assert len(shown) == 1
    assert (shown[0]["task"], shown[0]["backbone"], shown[0]["seed"]) == ("n_back, horizon 10", "gru", "2")
    assert "No summary.json" in shown[0]["note"]
    assert "13 finished, 1 unfinished" in page


def test_names_of_runs_are_no_markup(tmp_path: Path, write_run: WriteRun) -> None:
    write_run("run <script>alert(1)</script>", task="<b>task</b>", backbone='"><i>x')
    page = build_page(find_runs([tmp_path]), "<u>")
    reader = Reader(page)
    assert not [tag for tag, _ in reader.elements if tag in ("script", "b", "i", "u")]
    assert "<b>task</b>" in "".join(reader.text)


def test_one_broken_run_alone_makes_a_page(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{")
    page = build_page(find_runs([tmp_path]), "")
    Reader(page)
    (row,) = cells(page, "Runs")
    assert (row["state"], row["task"]) == ("broken", "?")
    assert "manifest.json cannot be read" in row["note"]


def test_a_sweep_of_45_runs_is_well_below_5_mb(tmp_path: Path, write_run: WriteRun) -> None:
    curve = [i / 200 for i in range(200)]
    for task in ("delayed_cue", "n_back", "tmaze"):
        for backbone in ("lru", "gru", "lstm"):
            for seed in range(5):
                write_run(f"{task}-{backbone}-{seed}", task=task, backbone=backbone, seed=seed, curve=curve)
    assert len(build_page(find_runs([tmp_path]), "").encode()) < 1_000_000


def test_the_command_writes_the_page(sweep_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    assert main(["report", str(sweep_folder), "--output", str(output), "--no-xray"]) == 0
    assert "14 runs, 13 of them finished" in capsys.readouterr().out
    Reader(output.read_text())
    assert main(["report", str(sweep_folder), "--output", str(output)]) == 0
    assert "No finished run has a checkpoint to look into." in output.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/empty"], "no run in '"),
        (["{folder}/nowhere"], "is not there"),
        (["{folder}/sweep", "--xray", "{folder}/empty"], "--xray: '"),
        (["{folder}/sweep", "--xray", "{folder}/sweep/far-0"], "no checkpoint '"),
    ],
)
def test_bad_input_ends_in_one_line(
    sweep_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    output = tmp_path / "page.html"
    assert main(["report", *(text.format(folder=tmp_path) for text in arguments), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not output.exists()


def test_without_the_extra_it_is_named(
    sweep_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("cyborg_torchrl.memory_benchmarks.report.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(sweep_folder)]) == 2
    assert "pip install 'cyborg-torchrl[report]'" in capsys.readouterr().err


def test_families_have_headings_and_published_scores_are_shown(tmp_path: Path, write_run: WriteRun) -> None:
    names = ["RepeatPreviousHard", "RepeatPreviousEasy", "CountRecallEasy", "MineSweeperEasy"]
    for name in names:
        config = write_run(name, task="popgym", success=None) / "config.yaml"
        config.write_text(config.read_text().replace('"level"', f'"id": "popgym-{name}-v0", "level"'))
    page = build_page(find_runs([tmp_path]), "")
    headings = re.findall(r"<(h[34])>([^<]*)", page)
    curves = headings[: len(names) + 1]
    assert [tag for tag, _ in curves] == ["h3", "h3", "h3", "h4", "h4"]
    assert [text.split(",")[0] for _, text in curves] == [
        "popgym-CountRecallEasy-v0",
        "popgym-MineSweeperEasy-v0",
        "RepeatPrevious",
        "popgym-RepeatPreviousEasy-v0",
        "popgym-RepeatPreviousHard-v0",
    ]
    assert page.count("<figcaption>Dashed: 0.191, the best of 13 models") == 2  # a curve and a chart of final scores
    assert page.count("<figcaption>Dashed") == 6
