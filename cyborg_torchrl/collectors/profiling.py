"""Names for parts of a run in torch's profiler. They cost nothing while no profiler is on."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch.profiler import record_function

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
PREFIX = "cyborg_torchrl."
"""Beginning of the names in a trace."""


def part(name: str) -> AbstractContextManager[object]:
    """Return a context whose time the profiler records; one that does nothing without a profiler."""
    return record_function(PREFIX + name) if torch.autograd._profiler_enabled() else nullcontext()


@contextmanager
def timed(name: str, seconds: dict[str, float]) -> Generator[None]:
    """Write the time of a part into `seconds`, and show it to a profiler."""
    started = time.perf_counter()
    with part(name):
        yield
    seconds[name] = time.perf_counter() - started


def recorded(name: str, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return a function whose calls the profiler records; the function itself without a profiler.

    For functions that are called at every step: ask once for each rollout.
    """
    if not torch.autograd._profiler_enabled():
        return function

    def call(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with record_function(PREFIX + name):
            return function(*arguments, **options)

    return call
