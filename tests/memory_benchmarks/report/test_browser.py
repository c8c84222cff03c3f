"""The page in a browser: no requests, no console messages, and no wider than the screen."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cyborg_torchrl.memory_benchmarks.report.page import build_page
from cyborg_torchrl.memory_benchmarks.report.runs import find_runs

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_it_opens_offline_without_messages(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    for backbone in ("lru", "gru"):
        for seed in range(3):
            write_run(f"a-rather-long-name-of-a-run/{backbone}-{seed}", backbone=backbone, seed=seed)
    file = tmp_path / "page.html"
    file.write_text(build_page(find_runs([tmp_path]), "No agent was looked into."))
    messages: list[str] = []
    requests: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        page = browser.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 800})
            page.goto(file.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("svg.chart").first.bounding_box()["width"] > 250
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
        browser.close()
    assert messages == []
    assert {url for url in requests if not url.startswith("data:")} == {file.as_uri()}
