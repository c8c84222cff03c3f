"""The page on the checker: its script runs, and every finding is on it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from cyborg_torchrl.diagnostics import check_recurrent

PAGE = (Path(__file__).parents[2] / "docs" / "checker.md").read_text()


def test_the_script_runs() -> None:
    (block,) = re.findall(r"<!-- runs as a test -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block, "checker.md", "exec"), {"__name__": "page"})


def test_every_finding_is_explained(build_policy: Callable, primed_env: Callable) -> None:
    policy = build_policy("gru")
    report = check_recurrent(policy, primed_env(policy), steps=16, chunk_lengths=(1, 8), drift_updates=1)
    for finding in report.findings:
        name = re.sub(r"(chunks of|seq_len) \d+", r"\1 L", finding.name)
        name = re.sub(r"(: (step|sequence) mode|: (KL|\|d).*|: (each step|one a chunk).*)$", "", name)
        name = name.removeprefix("same state: ") if name.endswith("whole rows") else name
        assert f"`{name}" in PAGE, finding.name
