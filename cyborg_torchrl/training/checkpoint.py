"""Checkpoint files. They are written completely or not at all, and reading them never runs code."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cyborg_torchrl.envs.signals import interrupts_deferred

FORMAT = "cyborg_torchrl.checkpoint"
DUMP = "cyborg_torchrl.dump"
"""Format of a dump: the steps before a number that is not finite. It is written and read like a checkpoint."""
VERSION = 2
Content = dict[str, Any]


class CheckpointError(ValueError):
    """A file that is not a usable checkpoint; the message is one line with the reason."""


def _from_version_1(content: Content, path: Path) -> Content:
    """Version 1 has only torch's random state, and neither the state of the environments nor the training time."""
    if "rng" not in content:
        raise CheckpointError(f"{path} lacks 'rng', which version 1 has.")
    added = {"collector": None, "best": None, "seconds": 0.0}
    return {**content, "version": VERSION, "rng": {"torch": content["rng"]}, **added}


def save_checkpoint(path: Path, content: Content, *, kind: str = FORMAT) -> None:
    """Write a checkpoint, and its folder if it does not exist.

    Raises:
        OSError: if it cannot be written. The old file is then unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In memory first: torch's file writer hides a full disk, and also Ctrl-C, behind an error about its archive.
    buffer = io.BytesIO()
    with interrupts_deferred():
        torch.save({"format": kind, "version": VERSION, **content}, buffer)
    write_whole(path, buffer.getbuffer())


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically: a reader sees the old file or the new one, never a part.

    Raises:
        OSError: if it cannot be written. The old file is then unchanged.
    """
    with _replaced(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _replaced(path: Path) -> Generator[Path]:
    """Yield the path of a file to write. It replaces the old file at once; after an error the old file stays."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, *, kind: str = FORMAT) -> Content:
    """Return the content of a checkpoint, converted to the current version.

    Raises:
        CheckpointError: if the file is not a complete checkpoint, or has a newer version.
        FileNotFoundError: if it does not exist.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises almost any error for a broken file
        raise CheckpointError(f"{path} is not a readable checkpoint: {_diagnosis(path, error)}") from None
    if not isinstance(content, dict) or content.get("format") != kind:
        raise CheckpointError(f"{path} is not a {kind.rpartition('.')[2]} of cyborg_torchrl.")
    version = content.get("version")
    if not isinstance(version, int) or version not in (1, VERSION):
        is_newer = isinstance(version, int) and version > VERSION
        reason = "a newer version of the package wrote it" if is_newer else "unknown"
        raise CheckpointError(f"{path} has format version {version} ({reason}); this one reads up to {VERSION}.")
    return _from_version_1(content, path) if version == 1 else content


def _diagnosis(path: Path, error: Exception) -> str:
    """Return the fault of a file that torch cannot read; torch's own messages rarely name it."""
    if isinstance(error, OSError) and not path.is_file():
        return str(error)
    with path.open("rb") as file:
        first_bytes = file.read(4)
    if not first_bytes:
        return "it is empty"
    if first_bytes != b"PK\x03\x04":  # torch writes zip archives
        return "it is no file of torch"
    if not zipfile.is_zipfile(path):
        return "it is cut off"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds other things than tensors and plain values"
    return "it is damaged"


class CheckpointFolder:
    """The checkpoints of a run: the last ones as `update_00000012.pt`, and `last.pt` and `best.pt`.

    Args:
        path: the folder.
        keep: number of last checkpoints that are kept, at least 1.
    """

    def __init__(self, path: Path, keep: int = 1) -> None:
        self.path, self.keep = path, keep
        self.best: float | None = None

    def save(self, content: Content, update: int, score: float | None) -> None:
        """Write a checkpoint. It becomes `best.pt` too if its score is the highest so far.

        Raises:
            OSError: if it cannot be written. The earlier checkpoints are then unchanged.
        """
        is_best = score is not None and (self.best is None or score > self.best)
        best = score if is_best else self.best
        path = self.path / f"update_{update:08d}.pt"
        save_checkpoint(path, {**content, "best": best})
        _link(path, self.path / "last.pt")
        if is_best:
            _link(path, self.path / "best.pt")
            self.best = best
        for old in self._newest_first()[self.keep :]:
            old.unlink(missing_ok=True)

    def newest(self) -> tuple[Path, Content, list[str]] | None:
        """Return the newest readable checkpoint, and the faults of newer ones; None without checkpoints.

        Raises:
            CheckpointError: if there are checkpoints, but none is readable.
        """
        faults: list[str] = []
        for path in (self.path / "last.pt", *self._newest_first()):
            try:
                return path, load_checkpoint(path), faults
            except FileNotFoundError:
                continue
            except CheckpointError as error:
                faults.append(str(error))
        if faults:
            raise CheckpointError(faults[0])
        return None

    def clean(self) -> None:
        """Remove the incomplete files of a killed process."""
        for path in self.path.glob("*.tmp"):
            path.unlink(missing_ok=True)

    def _newest_first(self) -> list[Path]:
        return sorted(self.path.glob(f"update_{'[0-9]' * 8}.pt"), reverse=True)


def _link(path: Path, link: Path) -> None:
    """Give a file a second name, or a copy if the file system has no links. An old file of that name is replaced."""
    with _replaced(link) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            temporary.write_bytes(path.read_bytes())
