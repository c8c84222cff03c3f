"""The pages' scripts run, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SCRIPT = re.compile(r"<!-- runs as a test -->\n```python\n(.*?)```", re.DOTALL)
WITH_SCRIPTS = [page for page in PAGES if page.parent != ROOT and SCRIPT.search(page.read_text())]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", WITH_SCRIPTS, ids=lambda page: page.name)
def test_scripts_run(page: Path) -> None:
    names: dict[str, object] = {"__name__": "page"}  # later scripts of a page may use what earlier ones define
    for number, script in enumerate(SCRIPT.findall(page.read_text())):
        exec(compile(script, f"{page.name}, script {number}", "exec"), names)
