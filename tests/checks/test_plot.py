"""The picture of the gradient horizon."""

import sys
from pathlib import Path

import pytest

from cyborg_torchrl.checks import HorizonCurve, plot_horizon

CURVES = {
    "whole": HorizonCurve("observation", 4, (1.0, 0.5, 0.2, 0.1), (0.4, 0.3, 0.2, 0.1)),
    "cut": HorizonCurve("observation", 4, (1.0, 0.0, 0.0, 0.0), (0.4, 0.3, 0.2, 0.1)),
    "nothing": HorizonCurve("observation", 4, (0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
}


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        plot_horizon(CURVES, tmp_path / "horizon.svg")
    text = (tmp_path / "horizon.svg").read_text()
    assert "cut (ends 0 back)" in text
    assert ">whole<" in text


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"cyborg-torchrl\[report\]"):
        plot_horizon(CURVES, tmp_path / "horizon.png")
