"""Checkpoints: written in one piece or not at all, read without running code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from cyborg_torchrl.process import interrupts_deferred

FORMAT = "cyborg_torchrl.checkpoint"
VERSION = 1


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint; the message is one line that says why."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint; a reader sees the old file or the new one, never a half.

    Raises:
        OSError: if it cannot be written; the old file is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            with interrupts_deferred():
                torch.save({"format": FORMAT, "version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint.

    Raises:
        CheckpointError: if the file is not a whole checkpoint of this version.
        FileNotFoundError: if it is not there.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of cyborg_torchrl.")
    if content["version"] != VERSION:
        raise CheckpointError(f"{path} has format version {content['version']}; this package reads version {VERSION}.")
    return content
