"""What a check found: a number, its limit, a verdict, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["passed", "failed", "info", "not_applicable"]
"""`info` figures are reported and never judged; `not_applicable` says that a check could not have seen anything."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    name: str
    value: float | None
    """What was measured; None where there is nothing to measure."""
    limit: float | None
    """What the value must not exceed; for horizons, what it must reach. None for figures that are not judged."""
    verdict: Verdict
    explanation: str
    """Symptom and cause, one sentence."""
    cure: str = ""
    """What to change, one sentence; empty where nothing is wrong."""


def judge(name: str, value: float, limit: float, *, passed: str, failed: str, cure: str) -> Finding:
    """Return a finding that passes if the value does not exceed the limit. NaN fails."""
    if value <= limit:
        return Finding(name, value, limit, "passed", passed)
    return Finding(name, value, limit, "failed", failed, cure)


def inform(name: str, value: float, explanation: str) -> Finding:
    """A figure that is reported and not judged."""
    return Finding(name, value, None, "info", explanation)


def skip(name: str, explanation: str, *, value: float | None = None, limit: float | None = None) -> Finding:
    """A check that could not have seen anything here."""
    return Finding(name, value, limit, "not_applicable", explanation)
