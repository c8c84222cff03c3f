"""Matplotlib figures as SVG inside of a page: themed by its style sheet, with ids of their own, told in words."""

from __future__ import annotations

import io
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

NUM_SERIES = 8
INK, LINE = "#010203", "#010204"
SERIES = tuple(f"#0102{16 + index:02x}" for index in range(NUM_SERIES))
"""Colours that stand for those of the page's style sheet."""
THEME = {INK: "currentColor", LINE: "var(--line)"} | {code: f"var(--s{i})" for i, code in enumerate(SERIES)}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # the same page from the same runs
    "text.parse_math": False,  # names are names
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


@contextmanager
def page_style() -> Generator[None]:
    """Matplotlib's settings while a figure of the page is drawn, from its making to its SVG; also a decorator."""
    with matplotlib.rc_context(STYLE):
        yield


def inline_svg(figure: Figure, name: str, label: str) -> Markup:
    """A figure, drawn under `page_style`, as an <svg> element.

    Args:
        figure: what is drawn.
        name: letters, digits and hyphens; what the element's ids begin with, so that no two figures share one.
        label: what it shows, for whoever cannot see it.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):  # a style would be that of the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        element.attrib = {key.removeprefix(XLINK): _value(key, value, name) for key, value in element.attrib.items()}
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label, "class": "chart"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _value(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == f"{XLINK}href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    for code, meaning in THEME.items():
        value = value.replace(code, meaning)
    return value
