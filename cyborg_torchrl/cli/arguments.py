"""Types of command-line arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

PICTURES = (".png", ".svg", ".pdf")


def positive(text: str) -> int:
    """An integer of 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more; got '{text}'")
    return value


def writable(text: str) -> Path:
    """A file in a folder that is there."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"'{path}' is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder '{path.parent}'")
    return path


def picture(text: str) -> Path:
    """A picture of a kind that can be written, in a folder that is there."""
    path = writable(text)
    if path.suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(PICTURES)}; got '{text}'")
    return path


def task_overrides(task: str) -> list[str]:
    """The overrides that choose a task: an environment, with its id after a colon where it has ids."""
    name, has_id, identity = task.partition(":")
    return [f"env={name}", *([f"env.id={identity}"] if has_id else [])]
