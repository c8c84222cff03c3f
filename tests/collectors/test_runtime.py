"""Memory of the process."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import json
from pathlib import Path
import torch
from cyborg_torchrl.collectors.runtime import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20

keep_freed_memory()
before = resident()
blocks = [torch.zeros(2**21) for _ in range(100)]  # 8 MiB each
del blocks
print(json.dumps([before, resident()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's heap")
def test_freed_memory_is_kept() -> None:
    output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    before, freed = json.loads(output)
    assert freed - before > 750  # MiB of 800
