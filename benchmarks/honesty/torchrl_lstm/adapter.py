"""The adapter of TorchRL with its `LSTMModule`."""

from benchmarks.honesty.torchrl import adapter
from cyborg_torchrl.checks import Report

PACKAGE = "torchrl"


def check(seed: int) -> tuple[Report, Report]:
    """Check the policy and the collector's second batch."""
    return adapter.check(seed, "LSTMModule")
