"""Hooks of the site: the changelog as a page, and no links to files outside the site."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
CHANGELOG = "changelog.md"
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?:\.\./)+[^)\s#]*)[^)]*\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Remove missing pages from the navigation; a page that is not in it is still a warning."""

    def written(entry: Any) -> Any:
        if isinstance(entry, str):
            return entry if entry == CHANGELOG or (Path(config.docs_dir) / entry).is_file() else None
        if isinstance(entry, list):
            return [kept for kept in map(written, entry) if kept]
        return {title: kept for title, below in entry.items() if (kept := written(below))}

    config.nav = written(config.nav)
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the changelog."""
    text = (ROOT / "CHANGELOG.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, CHANGELOG, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Replace links that lead out of docs/ by their text."""
    depth = len(PurePosixPath(page.file.src_uri).parts) - 1

    def stay(link: re.Match[str]) -> str:
        return link[1] if link[2].count("../") > depth else link[0]

    return LINK.sub(stay, markdown)
