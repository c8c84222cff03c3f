"""The states of the random number generators of a process."""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the states of torch's, NumPy's and Python's generators as tensors and numbers."""
    # NumPy's and Python's states become tensors, since checkpoints hold no other arrays.
    name, words, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 -- environments may use it
    version, numbers, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.tensor(words.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(numbers), gauss_next],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore a state of `random_state`; generators that are not in it do not change."""
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    if state.get("cuda") and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        name, words, *rest = state["numpy"]
        np.random.set_state((name, words.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if "python" in state:
        version, numbers, gauss_next = state["python"]
        random.setstate((version, tuple(numbers.tolist()), gauss_next))


@contextmanager
def random_state_kept() -> Generator[None]:
    """Restore the states of all generators at the end of the context."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
