"""Checks that a recurrent policy is trained on what it saw when it acted."""

from cyborg_torchrl.checks.findings import Finding, Verdict
from cyborg_torchrl.checks.plot import plot_horizon
from cyborg_torchrl.checks.recurrent import check_recurrent
from cyborg_torchrl.checks.report import HorizonCurve, Report

__all__ = ["Finding", "HorizonCurve", "Report", "Verdict", "check_recurrent", "plot_horizon"]
