"""Checks of recurrent policies and of environments."""

from cyborg_torchrl.checks.environment import EnvironmentFinding, check_environment
from cyborg_torchrl.checks.episodes import Episodes
from cyborg_torchrl.checks.findings import Finding, Verdict
from cyborg_torchrl.checks.functions import DiscreteActorCritic, MemoryPolicy
from cyborg_torchrl.checks.padding import check_padding
from cyborg_torchrl.checks.plot import plot_horizon
from cyborg_torchrl.checks.recorder import Recorder, check_memory
from cyborg_torchrl.checks.recurrent import check_recurrent
from cyborg_torchrl.checks.report import DriftCurve, HorizonCurve, Report

__all__ = [
    "DiscreteActorCritic",
    "DriftCurve",
    "EnvironmentFinding",
    "Episodes",
    "Finding",
    "HorizonCurve",
    "MemoryPolicy",
    "Recorder",
    "Report",
    "Verdict",
    "check_environment",
    "check_memory",
    "check_padding",
    "check_recurrent",
    "plot_horizon",
]
