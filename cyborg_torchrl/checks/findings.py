"""Findings of a check: a number, its limit, a verdict, and a cure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["passed", "failed", "consequence", "info", "not_applicable"]
"""`consequence`: above its limit, and another failed finding names the cause. `info`: reported and not judged.
`not_applicable`: the check could not have found a fault."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    name: str
    value: float | None
    """The measured number; None if there is none."""
    limit: float | None
    """The largest value allowed; for horizons the smallest. None if the value is not judged."""
    verdict: Verdict
    explanation: str
    """Symptom and cause in one sentence."""
    cure: str = ""
    """The change to make, in one sentence; empty if nothing is wrong."""


def judge(name: str, value: float, limit: float, *, passed: str, failed: str, cure: str) -> Finding:
    """Return a finding that passes if the value does not exceed the limit. NaN fails."""
    if value <= limit:
        return Finding(name, value, limit, "passed", passed)
    return Finding(name, value, limit, "failed", failed, cure)


def inform(name: str, value: float, explanation: str) -> Finding:
    """Return a finding that is reported and not judged."""
    return Finding(name, value, None, "info", explanation)


def skip(name: str, explanation: str, *, value: float | None = None, limit: float | None = None) -> Finding:
    """Return the finding of a check that could not have found a fault here."""
    return Finding(name, value, limit, "not_applicable", explanation)
