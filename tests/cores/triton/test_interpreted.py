"""Runs `test_parity.py` in a process where Triton interprets kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_interpreted_kernels_equal_the_torch_paths() -> None:
    pytest.importorskip("triton", reason="Triton is not installed (make test installs it)")
    # conftest.py imports the whole package, which these tests do not need.
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "--no-header"]
    done = subprocess.run(
        [*command, Path(__file__).with_name("test_parity.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
