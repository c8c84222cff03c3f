"""Protocol stubs in processes of their own, and MineRL's real client connected to them."""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cyborg_torchrl.envs.treechop.minerl import make_treechop

MISSING = [name for name in ("minerl", "gym", "shimmy") if importlib.util.find_spec(name) is None]
STUB = Path(__file__).parent / "protocol_stub.py"


class StubProcess:
    """A protocol stub that can be killed."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, str(STUB), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        if not said:
            self.process.stdout.close()
            self.process.wait()
            raise ValueError(f"no stub: {arguments}")
        self.port: int = json.loads(said)["port"]
        self.entries: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.entries.append(json.loads(line))

    @property
    def missions(self) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if "mission" in entry]

    @property
    def commands(self) -> list[str]:
        return [entry["command"] for entry in self.entries if "command" in entry]

    def end(self) -> None:
        """Kills it at once, as a crash would, and waits until all that it said has been read."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Launcher:
    """Stands in for MineRL's launcher: each call starts a stub and connects MineRL's client to it."""

    def __init__(self) -> None:
        self.stubs: list[StubProcess] = []
        self.arguments: tuple[str, ...] = ()

    def start(self, *arguments: str) -> StubProcess:
        self.stubs.append(StubProcess(*self.arguments, *arguments))
        return self.stubs[-1]

    def __call__(self) -> Any:
        return make_treechop(self.start().port)


@pytest.fixture(autouse=True)
def _client() -> Iterator[None]:
    """The client must be there. It leaves its sockets to the garbage collector, which runs before the next test."""
    if MISSING:
        pytest.skip(f"{', '.join(MISSING)} not installed: make test-minerl")
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    for stub in launcher.stubs:
        stub.end()


@pytest.fixture
def commands_of(launcher: Launcher) -> Callable[[], list[str]]:
    """All commands that reached any stub; ends the stubs."""

    def read() -> list[str]:
        for stub in launcher.stubs:
            stub.end()
        return [command for stub in launcher.stubs for command in stub.commands]

    return read
