"""The documentation's site: it builds without a warning, needs nothing from elsewhere, and documents what is public."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cores", "modules", "objectives", "data", "collectors", "envs", "checks")
FETCHED = re.compile(r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc=["']?(?:https?:)?//""")
KINDS = "stylesheet|preconnect|preload|prefetch|icon"
LINKED = re.compile(rf"""<link\b[^>]*\brel=["']?(?:{KINDS})[^>]*\bhref=["']?(?:https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        text = page.read_text()
        assert not FETCHED.search(text), page
        assert not LINKED.search(text), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet


def test_what_is_public_is_documented(site: Path) -> None:
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    known = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    modules = {package: importlib.import_module(f"cyborg_torchrl.{package}") for package in PACKAGES}
    names = {f"cyborg_torchrl.{package}.{name}" for package, module in modules.items() for name in module.__all__}
    assert len(names) > 70
    # a function may be called as its module is: then it is found there
    assert not {name for name in names - known if f"{name}.{name.rpartition('.')[2]}" not in known}
    top = importlib.import_module("cyborg_torchrl")
    ends = {name.rpartition(".")[2] for name in known}
    assert not set(top.__all__) - ends - {"keys"}


def test_links_out_of_the_docs_are_text(site: Path) -> None:
    text = (site / "tasks.html").read_text()
    assert "cyborg_torchrl/envs/" in text
    assert 'href="../cyborg_torchrl' not in text
    assert "Changelog" in (site / "changelog.html").read_text()
