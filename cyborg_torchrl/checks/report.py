"""The report of a check: findings and the gradient curve, as a table and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from cyborg_torchrl.checks.findings import Finding

STYLES = {"passed": "green", "failed": "bold red", "consequence": "yellow", "info": "cyan", "not_applicable": "dim"}


@dataclass(frozen=True)
class HorizonCurve:
    """How far back gradients reach, and how far back actions depend on observations."""

    leaf: str
    """Variable of the gradient: "observation", or "memory state" if observations have no gradient."""
    chunk_length: int
    gradient: tuple[float, ...]
    """Mean norm of the gradient of a step's distribution with respect to the leaf, for each lag from 0."""
    influence: tuple[float, ...]
    """Largest relative change of the distribution's parameters after a change of the leaf, for each lag from 0."""


@dataclass(frozen=True)
class DriftCurve:
    """How far stored states are from those of the new parameters, over optimiser updates on one rollout."""

    updates: tuple[int, ...]
    """Numbers of updates."""
    states: tuple[float, ...]
    """Relative distance of fresh and stored states."""
    params: tuple[float, ...]
    """Relative change of the distribution's parameters."""


@dataclass(frozen=True)
class Report:
    """Result of `check_recurrent`, `check_memory` or `Recorder.check`."""

    policy: str
    """Class of the policy."""
    state_keys: tuple[str, ...]
    num_envs: int
    steps: int
    """Steps of each environment in the rollout."""
    seed: int
    findings: tuple[Finding, ...]
    horizon: HorizonCurve | None = None
    drift: DriftCurve | None = None

    @property
    def has_passed(self) -> bool:
        """True if no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The findings of failed checks."""
        return tuple(finding for finding in self.findings if finding.verdict == "failed")

    def __getitem__(self, name: str) -> Finding:
        """Return the finding of that name.

        Raises:
            KeyError: if there is none.
        """
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(f"no finding '{name}'; there are: {', '.join(f.name for f in self.findings)}.")

    def with_findings(self, *findings: Finding) -> Report:
        """Return the report with more findings, such as that of `check_padding`."""
        return replace(self, findings=(*self.findings, *findings))

    def to_dict(self) -> dict[str, Any]:
        """Return numbers, strings, lists and dicts; infinity and NaN become strings ("inf", "nan")."""
        return _plain({**asdict(self), "has_passed": self.has_passed})

    def to_json(self) -> str:
        """Return the report as one JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> Table:
        """Return the findings as a table for a terminal."""
        title = f"{self.policy}: {'passed' if self.has_passed else f'{len(self.failed)} failed'}"
        table = Table(title=title, title_justify="left", expand=False)
        table.add_column("finding", overflow="fold")
        table.add_column("value", justify="right")
        table.add_column("limit", justify="right")
        table.add_column("verdict")
        table.add_column("what it means", overflow="fold")
        for finding in self.findings:
            text = f"{finding.explanation} {finding.cure}".strip()
            style = STYLES[finding.verdict]
            verdict = f"[{style}]{finding.verdict.replace('_', ' ')}[/]"
            table.add_row(finding.name, number_text(finding.value), number_text(finding.limit), verdict, text)
        return table


def number_text(value: float | None) -> str:
    """Return a number as the reports show it."""
    if value is None:
        return "-"
    is_count = value == round(value, 0) and abs(value) >= 1
    return f"{value:,.0f}" if 100 <= abs(value) < 1e7 or is_count else f"{value:.2g}"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
