"""One cause, one failure: findings that another failed finding explains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cyborg_torchrl.checks.findings import Finding

SEQUENCE_STATE = ("same state: chunks", "same state: whole", "same state: Rec", "step against sequence")
"""Findings in which a wrong sequence mode shows, or a wrong step mode."""
EXPLAINED: dict[str, tuple[str, ...]] = {
    "gradient horizon": ("gradient: ",),
    "reset timing: sequence mode": ("reset leak: seq", "reset gradient leak: seq", *SEQUENCE_STATE),
    "reset timing: step mode": ("reset leak: step", "reset gradient leak: step", *SEQUENCE_STATE),
    "partial reset: step mode": (
        *("same state", "states follow", "step against sequence", "reset leak: step", "reset gradient leak: step"),
        *("environment leak: step", "environment gradient leak: step", "environments alone"),
    ),
    "partial reset: sequence mode": (
        *SEQUENCE_STATE,
        *("reset leak: seq", "reset gradient leak: seq", "environment leak: seq", "environment gradient leak: seq"),
        "environments alone",
    ),
    "evaluation in between": ("state after",),
}
"""For a failed finding, the beginnings of the names of findings that then fail too."""


def explain(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings; those that fail because of a more specific failure become its consequences."""
    causes = [finding.name for finding in findings if finding.verdict == "failed" and finding.name in EXPLAINED]
    explained = []
    for finding in findings:
        cause = next((name for name in causes if finding.name.startswith(EXPLAINED[name])), None)
        if finding.verdict == "failed" and cause is not None:
            text = f"A consequence of the failure '{cause}'."
            finding = replace(finding, verdict="consequence", explanation=text, cure="")
        explained.append(finding)
    return explained
