"""Recurrent cores over plain tensors."""

from cyborg_torchrl.cores.abstract import Core, InitialState, State, restart, unroll
from cyborg_torchrl.cores.gru import GRULayer, build_gru
from cyborg_torchrl.cores.layered import LayeredCore, RecurrentLayer, layered_core_builder
from cyborg_torchrl.cores.lru import LRULayer, build_lru
from cyborg_torchrl.cores.lstm import LSTMLayer, build_lstm
from cyborg_torchrl.cores.memoryless import MemorylessCore
from cyborg_torchrl.cores.scan import gated_linear_scan
from cyborg_torchrl.cores.timescale import TimescaleNorm, log_spaced_timescales

__all__ = [
    "Core",
    "GRULayer",
    "InitialState",
    "LRULayer",
    "LSTMLayer",
    "LayeredCore",
    "MemorylessCore",
    "RecurrentLayer",
    "State",
    "TimescaleNorm",
    "build_gru",
    "build_lru",
    "build_lstm",
    "gated_linear_scan",
    "layered_core_builder",
    "log_spaced_timescales",
    "restart",
    "unroll",
]
