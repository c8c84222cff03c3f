"""The honesty table, and faults that are seeded into another library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.honesty import __main__ as honesty


def finding(name: str, value: float | None, verdict: str) -> dict[str, object]:
    return {"name": name, "value": value, "verdict": verdict}


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = [
        finding("step against sequence", 2.34e-7, "passed"),
        finding("reset timing: sequence mode", 1.0, "failed"),
        finding("reset leak: sequence mode", 0.5, "consequence"),
        finding("gradient: sequence against steps", None, "not_applicable"),
    ]
    entry = {"version": "1.2", "date": "2026-01-31", "reports": {"policy": {"findings": policy}, "rollout": None}}
    (tmp_path / "skrl.json").write_text(json.dumps(entry))
    monkeypatch.setattr(honesty, "RESULTS", tmp_path)
    *_, row = honesty.table().splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    by_name = dict(zip(honesty.COLUMNS, cells[3:], strict=True))
    assert cells[:3] == ["skrl, PPO_RNN", "1.2", "2026-01-31"]
    assert by_name["both modes"] == "2e-07"
    assert by_name["reset timing"] == "**failed** 1"
    assert by_name["reset leak"] == "follows 0.5"
    assert by_name["gradients"] == "n/a"
    assert by_name["same state"] == "n/a", "there was no rollout"


def test_every_adapter_has_a_row() -> None:
    folders = {path.parent.name for path in Path(honesty.__file__).parent.glob("*/adapter.py")}
    assert folders == set(honesty.LIBRARIES)


def test_the_page_shows_the_last_results() -> None:
    page = Path(honesty.ROOT) / "docs" / "honesty.md"
    assert honesty.table() in page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["", "states stored as zeros", "padding that trains", "values of a restarted memory"])
def test_faults_in_sb3_contrib(fault: str) -> None:
    pytest.importorskip("sb3_contrib")
    from benchmarks.honesty import seeded
    from benchmarks.honesty.sb3_contrib.adapter import check

    if not fault:
        assert all(report.has_passed for report in check(0))
        return
    with seeded.seeded(fault):
        failed = {finding.name for report in check(0) for finding in report.failed}
    assert seeded.FAULTS[fault][-1] in failed
