"""Checks of recurrent policies and of environments."""

from cyborg_torchrl.checks.environment import EnvironmentFinding, check_environment
from cyborg_torchrl.checks.findings import Finding, Verdict
from cyborg_torchrl.checks.plot import plot_horizon
from cyborg_torchrl.checks.recurrent import check_recurrent
from cyborg_torchrl.checks.report import HorizonCurve, Report

__all__ = [
    "EnvironmentFinding",
    "Finding",
    "HorizonCurve",
    "Report",
    "Verdict",
    "check_environment",
    "check_recurrent",
    "plot_horizon",
]
