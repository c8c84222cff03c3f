"""The picture of the gradient horizon."""

import sys
from pathlib import Path

import pytest

from cyborg_torchrl.diagnostics import HorizonCurve, plot_horizon

CURVES = {
    "whole": HorizonCurve("observation", 4, (1.0, 0.5, 0.2, 0.1), (0, 1, 2, 3), (0.4, 0.3, 0.2, 0.1)),
    "cut": HorizonCurve("observation", 4, (1.0, 0.0, 0.0, 0.0), (0, 1, 2, 3), (0.4, 0.3, 0.2, 0.1)),
    "nothing": HorizonCurve("observation", 4, (0.0, 0.0, 0.0, 0.0), (0, 1, 2, 3), (0.0, 0.0, 0.0, 0.0)),
}


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    plot_horizon(CURVES, tmp_path / "horizon.svg")
    text = (tmp_path / "horizon.svg").read_text()
    assert "cut: ends 0 steps back" in text or "<path" in text
    assert (tmp_path / "horizon.svg").stat().st_size > 5_000


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"cyborg-torchrl\[plot\]"):
        plot_horizon(CURVES, tmp_path / "horizon.png")
