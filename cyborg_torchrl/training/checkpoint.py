"""Checkpoints: written in one piece or not at all, read without running code, brought up to this version."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cyborg_torchrl.envs.signals import interrupts_deferred

FORMAT = "cyborg_torchrl.checkpoint"
DUMP = "cyborg_torchrl.dump"
"""Of a file with what was not finite, written and read in the same way."""
VERSION = 2
Content = dict[str, Any]


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint; the message is one line that says why."""


def _from_version_1(content: Content) -> Content:
    """Version 1 kept torch's generator alone, and neither what the environments were in the middle of nor the time."""
    return {**content, "rng": {"torch": content["rng"]}, "collector": None, "best": None, "seconds": 0.0}


MIGRATIONS: dict[int, Callable[[Content], Content]] = {1: _from_version_1}
"""From each older version to the one that follows it."""


def save_checkpoint(path: Path, content: Content, *, kind: str = FORMAT) -> None:
    """Writes a checkpoint in one piece (`write_whole`), and its folder if there is none.

    Raises:
        OSError: if it cannot be written; the old file is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # torch's own file writer turns a full disk into an error about its archive,
    with interrupts_deferred():  # and Ctrl-C too, whatever it writes to
        torch.save({"format": kind, "version": VERSION, **content}, buffer)
    write_whole(path, buffer.getbuffer())


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Writes a file; a reader sees the old one or the new one, never a half.

    Raises:
        OSError: if it cannot be written; the old file is then still there.
    """
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, *, kind: str = FORMAT) -> Content:
    """Reads a checkpoint; one of an older version as this version would have written it.

    Raises:
        CheckpointError: if the file is not a whole checkpoint, or of a newer version.
        FileNotFoundError: if it is not there.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # of a broken file, almost any
        raise CheckpointError(f"{path} is not a readable checkpoint: {_what_is_wrong(path, error)}") from None
    if not isinstance(content, dict) or content.get("format") != kind:
        raise CheckpointError(f"{path} is not a {kind.rpartition('.')[2]} of cyborg_torchrl.")
    version = content.get("version")
    if not isinstance(version, int) or not (version == VERSION or version in MIGRATIONS):
        what = (
            "a newer version of the package wrote it" if isinstance(version, int) and version > VERSION else "unknown"
        )
        raise CheckpointError(f"{path} has format version {version} ({what}); this one reads up to {VERSION}.")
    while content["version"] < VERSION:
        try:
            content = {**MIGRATIONS[content["version"]](content), "version": content["version"] + 1}
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} lacks {error}, which version {version} has.") from None
    return content


def _what_is_wrong(path: Path, error: Exception) -> str:
    """With a file that torch does not read; what torch says of it seldom tells."""
    if path.is_dir():
        return "it is a folder"
    if isinstance(error, OSError) and not path.is_file():
        return str(error)
    with path.open("rb") as file:
        begin = file.read(4)
    if not begin:
        return "it is empty"
    if begin != b"PK\x03\x04":  # torch writes zip archives
        return "it is no file of torch"
    if not zipfile.is_zipfile(path):
        return "it is cut off"
    is_foreign = isinstance(error, pickle.UnpicklingError)
    return "it holds other things than tensors and plain values" if is_foreign else "it is damaged"


class CheckpointFolder:
    """The checkpoints of a run: the last N as `update_00000012.pt`, `last.pt` and `best.pt`.

    Args:
        path: the folder.
        keep: N, at least 1.
    """

    def __init__(self, path: Path, keep: int = 1) -> None:
        self.path, self.keep = path, keep
        self.best: float | None = None

    def save(self, content: Content, update: int, score: float | None) -> None:
        """Writes a checkpoint; it is the best one too if its score is the highest so far.

        Raises:
            OSError: if it cannot be written; those before are then still there.
        """
        is_best = score is not None and (self.best is None or score > self.best)
        best = score if is_best else self.best
        path = self.path / f"update_{update:08d}.pt"
        save_checkpoint(path, {**content, "best": best})
        _put_link(path, self.path / "last.pt")
        if is_best:
            _put_link(path, self.path / "best.pt")
            self.best = best
        for old in sorted(self._numbered(), reverse=True)[self.keep :]:
            old.unlink(missing_ok=True)

    def newest(self) -> tuple[Path, Content, list[str]] | None:
        """The newest checkpoint that can be read, and what is wrong with those that are newer; None if there is none.

        Raises:
            CheckpointError: if there are some, and none can be read.
        """
        faults: list[str] = []
        for path in (self.path / "last.pt", *sorted(self._numbered(), reverse=True)):
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
        """Removes what a process that was killed left half written."""
        for path in self.path.glob("*.tmp"):
            path.unlink(missing_ok=True)

    def _numbered(self) -> Iterator[Path]:
        return (path for path in self.path.glob("update_*.pt") if re.fullmatch(r"update_\d+\.pt", path.name))


def _put_link(path: Path, link: Path) -> None:
    """Gives a file a second name, in place of what had it; a copy where the file system has no links."""
    temporary = link.with_suffix(f".{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            temporary.write_bytes(path.read_bytes())
        temporary.replace(link)
    finally:
        temporary.unlink(missing_ok=True)
