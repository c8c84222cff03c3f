"""Checks that a recurrent policy is trained on what it saw when it acted."""

from cyborg_torchrl.diagnostics.check import check_recurrent
from cyborg_torchrl.diagnostics.findings import Finding, Verdict
from cyborg_torchrl.diagnostics.plot import plot_horizon
from cyborg_torchrl.diagnostics.report import HorizonCurve, Report

__all__ = ["Finding", "HorizonCurve", "Report", "Verdict", "check_recurrent", "plot_horizon"]
