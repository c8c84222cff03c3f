"""Memory of the process."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

from cyborg_torchrl import process
from cyborg_torchrl.process import FreedMemory

PROGRAM = """
import json
from pathlib import Path
import torch
from cyborg_torchrl.process import FreedMemory, keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20

keep_freed_memory()
before = resident()
blocks = [torch.zeros(2**21) for _ in range(100)]  # 8 MiB each
kept = blocks[::10]
values = [float(block.add_(i).sum()) for i, block in enumerate(kept)]
del blocks
freed = resident()
enough = FreedMemory(2**40).give_back()
given = FreedMemory(2**28).give_back()
after = resident()
same = values == [float(block.sum()) for block in kept]
print(json.dumps([before, freed, enough, given, after, same]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's heap")
def test_freed_memory_is_kept_until_there_is_too_much_of_it() -> None:
    output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    before, freed, enough, given, after, same = json.loads(output)
    assert freed - before > 750  # MiB: glibc was told to keep it
    assert not enough
    assert given
    assert same
    assert 70 < after - before < 200  # what is in use is 80


def test_all_that_is_free_is_given_back_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    now = 0.0
    monkeypatch.setattr(process, "_trim", lambda: given.append(now) or True)
    memory = FreedMemory(2**60, every=10.0, clock=lambda: now)
    for now in (0.0, 5.0, 9.9, 10.5, 11.0, 20.0, 20.4, 20.5, 45.0, 46.0):
        assert memory.give_back() == (now in (10.5, 20.5, 45.0))
    assert given == [10.5, 20.5, 45.0]
