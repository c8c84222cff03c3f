"""Errors that an environment raises: where they happened, as a note on the error."""

from __future__ import annotations

import pickle
import traceback
from typing import Any

PREFIX = "environment "


def add_place(error: Exception, environment: int, seed: int | None, step: int) -> None:
    """Add a note with the environment, the seed of its episode and the step, counted from 1; 0 is the reset."""
    where = f"in step {step} of its episode" if step else "in its reset"
    text = " ".join(str(error).split())
    error.add_note(f"{PREFIX}{environment} (seed {seed}) failed {where}: {type(error).__name__}: {text}")


def first_reset(env: Any) -> tuple[Any, dict[str, Any]]:
    """Reset an environment that is being looked at before the batch is built; its errors name the first one."""
    try:
        return env.reset(seed=0)
    except Exception as error:
        add_place(error, 0, 0, 0)
        raise


def failed_place(error: Exception) -> str | None:
    """Return the note that `add_place` has written; None for any other error."""
    notes = getattr(error, "__notes__", [])
    return next((note for note in notes if note.startswith(PREFIX)), None)


def portable(error: Exception) -> Exception:
    """Return an error that can be sent to another process, with its traceback as a note."""
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    error.add_note(f"Traceback in the environment's process:\n{frames}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error may refuse both in any way
        other = RuntimeError(repr(error))
        other.__notes__ = error.__notes__
        return other
    return error
