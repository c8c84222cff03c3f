"""The benchmark of a GPU, without a GPU: each part at tiny sizes, the command, and the tables."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import timing
from benchmarks.gpu.gpu_tests import result_of
from benchmarks.gpu.part import PARTS
from benchmarks.gpu.table import markdown
from benchmarks.gpu.targets import lines
from benchmarks.gpu.timing import Row, Subject, time_limit, timed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.0)


SLOW = ("tests", "default_runs")
"""The first collects tests; the second has many runs of the code that `mission` tests, too."""


@pytest.mark.parametrize("part", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in PARTS])
def test_each_part_runs_on_a_cpu(part: str) -> None:
    rows = list(PARTS[part].rows(CPU, True))
    assert rows
    assert not [row for row in rows if "error" in row]
    assert all(row.get("is_equal", True) for row in rows)
    assert {row["left_out"] for row in rows if row.get("mode") == "graph"} <= {
        "RuntimeError: a CPU has no CUDA graphs",
    }
    json.dumps(rows)
    fields = {"machine": {"gpu": None, "python": "3", "versions": {}}, "recorded": "", "commit": "", "is_smoke": True}
    assert markdown({**fields, "parts": {part: {"rows": rows}}}).count("\n|") > 10


def test_the_parts_fit_into_nine_minutes() -> None:
    assert sum(part.seconds for part in PARTS.values()) <= 9 * 60 - command.MARGIN


def failing() -> timing.Run:
    raise ValueError("a reason\nin two lines")


def waiting() -> timing.Run:
    signal.pause()
    raise AssertionError


def test_ours_fails_and_others_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PREPARE_SECONDS", 0.05)
    about = {"resets": 0.0}
    assert list(timed(Subject("lru", failing), CPU, about)) == [
        {"resets": 0.0, "subject": "lru", "mode": "eager", "error": "ValueError: a reason"}
    ]
    (row,) = timed(Subject("theirs", waiting, is_ours=False), CPU, about)
    assert row["left_out"] == "TimeoutError: not ready after 0.05 s"


class Graphs:
    """Stands for CUDA graphs."""

    def warm_up(self, run: timing.Run) -> object:
        return run()

    def capture(self, run: timing.Run) -> timing.Run:
        if run is refused:
            raise RuntimeError("operation not permitted when stream is capturing")
        return run


class Event:
    """Stands for a CUDA event; two of them are one millisecond apart."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1.0


def refused() -> None: ...


def test_times_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CudaGraphs", Graphs)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "set_sync_debug_mode", "current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    calls: list[bool] = []

    def run() -> None:
        calls.append(torch.backends.cudnn.allow_tf32)

    before = torch.backends.cudnn.allow_tf32
    subject = Subject("cuDNN GRU, float32", lambda: run, allow_tf32=not before)
    rows = list(timed(subject, torch.device("cuda"), {"resets": 0.0}))
    assert [(row["mode"], row["ms"]) for row in rows] == [("eager", 1.0), ("graph", 1.0)]
    assert set(calls) == {not before}
    assert torch.backends.cudnn.allow_tf32 == before
    eager, graph = timed(Subject("pmm", lambda: refused), torch.device("cuda"), {})
    assert eager["ms"] == 1.0
    assert graph["left_out"].startswith("RuntimeError: operation not permitted")


def test_a_time_limit_ends_with_its_block() -> None:
    with time_limit(60.0):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 50
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_results_of_tests_are_read_with_and_without_processes() -> None:
    assert result_of("tests/test_cuda.py::test_x[a b] PASSED   [ 50%]") == {
        "test": "tests/test_cuda.py::test_x[a",
        "result": "PASSED",
    }
    assert result_of("[gw1] [ 10%] FAILED tests/test_cuda.py::test_x") == {
        "test": "tests/test_cuda.py::test_x",
        "result": "FAILED",
    }
    assert result_of("FAILED tests/test_cuda.py::test_x - AssertionError") is None  # in the summary
    assert result_of("2 passed in 3 s") is None


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    said = capsys.readouterr().err
    assert "needs a CUDA GPU" in said
    assert said.count("\n") == 1
    assert command.main(["--device", "cpu"]) == 2


@pytest.fixture
def run_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict, dict[str, float]]]:
    """Runs the command with parts that give these rows, or raise. Returns its code, its file and the time limits."""

    def run(rows: dict[str, list[Row]], errors: dict[str, str] | None = None, *arguments: str):
        limits: dict[str, float] = {}

        def part(name: str, options: list[str], seconds: float, on_row: Callable[[Row], None]) -> Row:
            limits[name] = seconds
            assert options == ["--device", "cpu", "--smoke"]
            for row in rows[name]:
                on_row(row)
            if (errors or {}).get(name) == "interrupt":
                raise KeyboardInterrupt
            return {"seconds": 1.0, "limit": seconds} | ({"error": errors[name]} if name in (errors or {}) else {})

        monkeypatch.setattr(command, "run_part", part)
        path = tmp_path / "gpu.json"
        names = ["--parts", *rows]
        code = command.main(["--device", "cpu", "--smoke", "--output", str(path), *names, *arguments])
        return code, json.loads(path.read_text()), limits

    return run


EQUAL = {"check": "two runs", "subject": "lru", "is_equal": True, "largest_difference": 0.0}


def test_the_command_writes_every_row_and_shares_the_time(run_with, capsys: pytest.CaptureFixture[str]) -> None:
    code, written, limits = run_with({"tests": [{"passed": 3, "failed": 0, "skipped": 0}], "exact": [EQUAL]})
    assert code == 0
    assert written["parts"]["exact"]["rows"] == [EQUAL]
    assert written["machine"]["versions"]["torch"] == torch.__version__
    share = (9 * 60 - command.MARGIN) / (PARTS["tests"].seconds + PARTS["exact"].seconds)
    assert limits["tests"] == pytest.approx(share * PARTS["tests"].seconds, abs=2)
    assert limits["exact"] == pytest.approx(9 * 60 - command.MARGIN, abs=2)  # the tests left their time
    shown = capsys.readouterr().out
    assert "exact: check two runs, subject lru, is_equal True" in shown
    assert "Tests: 3 passed, 0 failed, 0 skipped." in shown


@pytest.mark.parametrize(
    ("row", "errors", "code"),
    [
        (EQUAL | {"is_equal": False}, {}, 1),
        (EQUAL | {"error": "it failed"}, {}, 1),
        (EQUAL, {"exact": "ValueError: it failed"}, 1),
        (EQUAL, {"exact": "interrupt"}, 130),
    ],
)
def test_a_failure_is_reported_and_the_others_run(run_with, row: Row, errors: dict[str, str], code: int) -> None:
    found, written, _ = run_with({"exact": [row], "mission": []}, errors)
    assert found == code
    assert written["parts"]["exact"]["rows"] == [row]
    assert ("mission" in written["parts"]) == (code != 130)


def test_a_part_that_hangs_is_stopped() -> None:
    record = command.run_part("sequences", ["--device", "cpu", "--smoke"], 0.2, lambda row: None)
    assert record["error"] == "stopped after 0 s"
    assert record["seconds"] < 10


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    assert command.main(["--device", "cpu", "--smoke", "--parts", "large", "kernels", "--output", str(path)]) == 0
    parts = json.loads(path.read_text())["parts"]
    assert {name: "error" in part for name, part in parts.items()} == {"large": False, "kernels": False}
    printed = capsys.readouterr().out
    assert command.main(["--markdown", str(path)]) == 0
    assert capsys.readouterr().out.strip() in printed


def row(subject: str, mode: str, ms: float, resets: float = 0.0, shape: tuple[int, ...] = (64, 128, 64, 128)) -> Row:
    return {"shape": list(shape), "resets": resets, "subject": subject, "mode": mode, "ms": ms}


RUN = {
    "run": "lru",
    "steps": 192384,
    "steps_per_second": 90_000.4,
    "steps_per_second_after_first_update": 123_456.0,
    "success": 1.0,
    "eval_episodes": 250,
    "ratio_error": 2e-5,
}
RESULTS = {
    "machine": {"gpu": "A GPU", "python": "3.12", "versions": {"torch": "2.11", "mamba-ssm": None}},
    "recorded": "2026-12-01",
    "commit": "abc",
    "is_smoke": False,
    "parts": {
        "tests": {"rows": [{"passed": 5, "failed": 1, "skipped": 2}], "error": "stopped after 90 s"},
        "exact": {"rows": [EQUAL, EQUAL | {"check": "resumed run", "is_equal": False, "largest_difference": 1e-7}]},
        "sequences": {
            "rows": [
                row("lru", "eager", 0.5),
                row("lru", "graph", 0.1),
                row("gru", "eager", 0.9),
                row("cuDNN GRU, TF32", "eager", 1.5),
                row("cuDNN GRU, TF32", "graph", 0.8),
                row("cuDNN GRU, float32", "eager", 2.0),
                {key: value for key, value in row("TorchRL GRU, Triton", "eager", 0.0).items() if key != "ms"}
                | {"left_out": "ImportError: no module"},
            ]
        },
        "default_runs": {"rows": [RUN]},
    },
}
TABLES = """\
A GPU: Python 3.12, torch 2.11. Recorded on 2026-12-01, commit abc. Tests: 5 passed, 1 failed, 2 skipped.

| what | ours | compared with | result | target |  |
|---|---|---|---|---|---|
| lru, in a graph: 64 x 128, width 128 | 0.1 ms (graph) | cuDNN GRU, TF32: 0.8 ms (graph) | 8.00 | >= 10 | **missed** |
| gru, in a graph |  | cuDNN GRU |  | >= 2 | not measured |
| lstm, in a graph |  | cuDNN LSTM |  | >= 2 | not measured |
| mamba block, in a graph |  | before our kernels, with mamba-ssm's |  | >= 2 | not measured |
| gru, 1% resets |  | TorchRL GRU |  | >= 1.5 | not measured |
| gru, 1% resets |  | cuDNN GRU |  | >= 20 | not measured |
| every core |  | cuDNN GRU |  | >= 1 | not measured |
| default run, lru: steps/s with start-up |  |  | 90,000 | >= 100,000 | **missed** |
| default run, lru: steps/s after the first update |  |  | 123,456 | >= 100,000 | met |
| default run, lru: success |  |  | 1.000 (250 episodes) | 1.0 | met |
| default run, lru: ratio error |  |  | 2.0e-05 | <= 1e-05 | **missed** |
| 8,192 environments, lru of width 128: steps/s with start-up |  |  |  | >= 1,500,000 | not measured |
| 8,192 environments, lru of width 128: steps/s after the first update |  |  |  | >= 1,500,000 | not measured |
| command of the suite, mamba_gru: steps/s with start-up |  |  |  | >= 40,000 | not measured |
| command of the suite, mamba_gru: steps/s after the first update |  |  |  | >= 40,000 | not measured |
| command of the suite, mamba_gru: success |  |  |  | 1.0 | not measured |
| T = 1 and T = n |  |  |  | equal bit by bit | not measured |
| two runs, lru |  |  | equal | equal bit by bit | met |
| with and without graphs |  |  |  | equal bit by bit | not measured |
| resumed run, lru |  |  | differ by up to 1.0e-07 | equal bit by bit | **missed** |

| rows x steps x inputs, width | resets | forward and backward of | eager | in a graph |
|---|---|---|---|---|
| 64 x 128 x 64, 128 | 0% | lru | 0.5 ms | 0.1 ms |
| 64 x 128 x 64, 128 | 0% | gru | 0.9 ms |  |
| 64 x 128 x 64, 128 | 0% | cuDNN GRU, TF32 | 1.5 ms | 0.8 ms |
| 64 x 128 x 64, 128 | 0% | cuDNN GRU, float32 | 2 ms |  |
| 64 x 128 x 64, 128 | 0% | TorchRL GRU, Triton |  |  |

| run | steps | steps/s with start-up | after the first update | success | ratio error |
|---|---|---|---|---|---|
| lru | 192,384 | 90,000 | 123,456 | 1.000 | 2.0e-05 |

- tests failed: stopped after 90 s
- sequences, eager, left out (ImportError: no module): TorchRL GRU, Triton
"""


def test_the_tables_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(RESULTS))
    assert command.main(["--markdown", str(path)]) == 0
    assert capsys.readouterr().out == TABLES


def test_a_file_without_results_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    for text in ("{}", "[", None):
        if text is not None:
            path.write_text(text)
        else:
            path.unlink()
        assert command.main(["--markdown", str(path)]) == 2
        assert "error: cannot read" in capsys.readouterr().err


def test_each_target_is_compared_with_the_fastest_other() -> None:
    large, many = (2048, 256, 128, 128), (1024, 128, 128, 128)
    parts = {
        "large": [
            row("gru", "eager", 9.0, 0.01, large),
            row("gru", "graph", 6.0, 0.01, large),
            row("gru", "graph", 1.0, 0.1, large),
            row("TorchRL GRU, Triton", "eager", 12.0, 0.01, large),
            row("cuDNN GRU on padded episodes, TF32", "eager", 300.0, 0.01, large),
            row("cuDNN GRU on padded episodes, float32", "eager", 90.0, 0.01, large),
            row("cuDNN GRU, TF32", "eager", 1.0, 0.0, large),
        ],
        "cores": [
            row("cuDNN GRU, TF32", "graph", 4.0, 0.0, many),
            row("lru", "eager", 5.0, 0.0, many),
            row("lru", "graph", 2.0, 0.0, many),
            row("ffm", "eager", 8.0, 0.0, many),
        ],
        "sequences": [row("mamba block", "graph", 2.0, shape=(64, 128, 128, 128))],
    }
    found = [(line.what.split(":")[0], line.result, line.is_met) for line in lines(parts) if line.ours]
    assert found == [
        ("mamba block, in a graph", "2.81", True),  # 5.61 ms in the earlier measurements
        ("gru, 1% resets", "2.00", True),
        ("gru, 1% resets", "15.00", False),
        ("lru", "2.00", True),
        ("ffm", "0.50", False),
    ]
