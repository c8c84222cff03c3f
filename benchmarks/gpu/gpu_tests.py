"""The tests that need a GPU, as `pytest -m gpu` runs them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu.timing import Row

ROOT = Path(__file__).parents[2]
SMOKE = ["tests/cores/test_kernels.py"]
RESULT = re.compile(r"\b(PASSED|FAILED|SKIPPED|ERROR|XFAIL)\b")
TEST = re.compile(r"\btests/\S+")
PROCESSES = 4


def gpu_tests(device: torch.device, is_smoke: bool) -> Iterator[Row]:
    """Run every test that is marked `gpu`. Yield each failure at once, then the numbers."""
    del device
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    files = SMOKE if is_smoke else [str(path.relative_to(ROOT)) for path in marked]
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "--tb=line", "-p", "no:cacheprovider", *files]
    if not is_smoke and importlib.util.find_spec("xdist") and (os.cpu_count() or 1) > PROCESSES:
        command += ["--numprocesses", str(PROCESSES)]
    counts: Counter[str] = Counter()
    last = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            last = line.strip() or last
            row = result_of(line)
            if row is None:
                continue
            counts[row["result"]] += 1
            if row["result"] in ("FAILED", "ERROR"):
                yield {**row, "error": f"the test {row['test']} did not pass"}
    row = {"passed": counts["PASSED"], "failed": counts["FAILED"] + counts["ERROR"], "skipped": counts["SKIPPED"]}
    if process.returncode and not row["failed"]:
        row["error"] = f"pytest: {last}"
    yield row


def result_of(line: str) -> Row | None:
    """Return the test and its result in a line of `pytest -v`, with or without several processes; else None.

    The summary at the end names failures again, and is not counted.
    """
    result, test = RESULT.search(line), TEST.search(line)
    if result is None or test is None or line.startswith(("FAILED", "ERROR")):
        return None
    return {"test": test[0], "result": result[1]}
