"""Episodes as text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cyborg_torchrl.cli.playback.episodes import Frame

MAX_NUMBERS = 16
"""Larger observations are described by shape, range and mean."""


class Trace:
    """Writes a line for each step, and counts steps with the same observation and no reward.

    Args:
        write: takes the text.
        is_full: a line for every step.
    """

    def __init__(self, write: Callable[[str], object], *, is_full: bool = False) -> None:
        self.write, self.is_full = write, is_full
        self._episode, self._last, self._skipped = 0, "", 0

    def add(self, frame: Frame) -> None:
        """Write a step."""
        if frame.episode != self._episode:
            self._episode, self._last = frame.episode, ""
            self.write(f"episode {frame.episode}\n  step  observation -> action, reward\n")
        if not frame.action:
            self._flush()
            success = "" if frame.success is None else f", success {frame.success:g}"
            self.write(f"  {frame.end} after {frame.step} steps: return {frame.total:g}{success}\n")
            return
        seen = ", ".join(_described(name, value) for name, value in frame.observation.items())
        is_nothing_new = seen == self._last and frame.reward == 0.0 and not frame.end
        self._last = seen
        if is_nothing_new and not self.is_full:
            self._skipped += 1
            return
        self._flush()
        self.write(f"{frame.step:>6}  {seen} -> {frame.action}, {frame.reward:g}\n")

    def _flush(self) -> None:
        if self._skipped:
            self.write(f"        ... {self._skipped} more with the same observation and no reward\n")
            self._skipped = 0


def _described(name: str, value: Tensor) -> str:
    numbers = value.flatten()
    if numbers.numel() <= MAX_NUMBERS:
        text = " ".join(f"{number:.3g}" for number in numbers.tolist())
        return f"{name} [{text}]" if value.ndim else f"{name} {text}"
    numbers = numbers.to(torch.float64)
    low, high, mean = float(numbers.min()), float(numbers.max()), float(numbers.mean())
    return f"{name} {list(value.shape)} from {low:.3g} to {high:.3g}, mean {mean:.4g}"
