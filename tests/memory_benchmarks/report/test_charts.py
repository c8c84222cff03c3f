"""Figures inside a page."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure

from cyborg_torchrl.memory_benchmarks.report.charts import COLOURS, STYLE, inline_svg


def draw(name: str) -> str:
    with rc_context(STYLE):
        figure = Figure(figsize=(2, 2))
        axes = figure.add_subplot(title="a < b & c")
        axes.plot([0, 1], [0, 1], color=COLOURS[3], marker="o")
        axes.fill_between([0, 1], [0, 0], [1, 1], color=COLOURS[3], alpha=0.2)
        axes.imshow([[0.0, 1.0]])
        return inline_svg(figure, name, 'two "points"')


def test_no_two_figures_share_ids_and_references_still_work() -> None:
    first, second = draw("one"), draw("two")
    ids = re.findall(r' id="([^"]+)"', first)
    assert ids
    assert all(name.startswith("one-") for name in ids)
    assert not set(ids) & set(re.findall(r' id="([^"]+)"', second))
    references = re.findall(r'href="#([^"]+)"', first) + re.findall(r"url\(#([^)]+)\)", first)
    assert references
    assert set(references) <= set(ids)


def test_it_needs_no_network_and_has_the_colours_of_the_page() -> None:
    svg = draw("one")
    assert "http" not in svg
    assert all(target.startswith(("#", "data:image/png")) for target in re.findall(r'href="([^"]+)"', svg))
    assert "var(--s3)" in svg
    assert "currentColor" in svg
    assert "#0102" not in svg


def test_it_is_well_formed_and_described_in_words() -> None:
    root = ElementTree.fromstring(draw("one"))
    assert (root.get("role"), root.get("aria-label")) == ("img", 'two "points"')
    assert "a < b & c" in "".join(root.itertext())


def test_the_same_figure_is_the_same_text() -> None:
    assert draw("one") == draw("one")
