"""Recurrent cores over plain tensors."""

from cyborg_torchrl.cores.abstract import Core, InitialState, State, Terms, restart, unroll
from cyborg_torchrl.cores.attention import AttentionCore, build_attention
from cyborg_torchrl.cores.bistable import BistableLayer, build_bistable
from cyborg_torchrl.cores.ffm import FFMBlock
from cyborg_torchrl.cores.gated_delta import GatedDeltaBlock
from cyborg_torchrl.cores.gru import GRULayer, build_gru
from cyborg_torchrl.cores.layered import LayeredCore, RecurrentLayer, layered_core_builder
from cyborg_torchrl.cores.lru import LRULayer, build_lru
from cyborg_torchrl.cores.lstm import LSTMLayer, build_lstm
from cyborg_torchrl.cores.mamba import MambaBlock
from cyborg_torchrl.cores.mamba2 import Mamba2Block
from cyborg_torchrl.cores.mamba_family import (
    build_ffm,
    build_gated_delta,
    build_mamba,
    build_mamba2,
    build_mamba_gru,
    build_pseudo_mamba,
)
from cyborg_torchrl.cores.memoryless import MemorylessCore
from cyborg_torchrl.cores.min_gru import MinGRULayer, build_min_gru
from cyborg_torchrl.cores.mlp import MLPBlock
from cyborg_torchrl.cores.pmm import PMMCore, augment_with_pmm, build_pmm
from cyborg_torchrl.cores.pseudo_mamba import PseudoMambaBlock
from cyborg_torchrl.cores.rnn import RNNLayer, build_rnn
from cyborg_torchrl.cores.scan import gated_linear_scan
from cyborg_torchrl.cores.selective_scan import selective_scan
from cyborg_torchrl.cores.ssd import ssd_scan
from cyborg_torchrl.cores.stack import StackCore, build_stack
from cyborg_torchrl.cores.timescale import TimescaleNorm, log_spaced_timescales

__all__ = [
    "AttentionCore",
    "BistableLayer",
    "Core",
    "FFMBlock",
    "GRULayer",
    "GatedDeltaBlock",
    "InitialState",
    "LRULayer",
    "LSTMLayer",
    "LayeredCore",
    "MLPBlock",
    "Mamba2Block",
    "MambaBlock",
    "MemorylessCore",
    "MinGRULayer",
    "PMMCore",
    "PseudoMambaBlock",
    "RNNLayer",
    "RecurrentLayer",
    "StackCore",
    "State",
    "Terms",
    "TimescaleNorm",
    "augment_with_pmm",
    "build_attention",
    "build_bistable",
    "build_ffm",
    "build_gated_delta",
    "build_gru",
    "build_lru",
    "build_lstm",
    "build_mamba",
    "build_mamba2",
    "build_mamba_gru",
    "build_min_gru",
    "build_pmm",
    "build_pseudo_mamba",
    "build_rnn",
    "build_stack",
    "gated_linear_scan",
    "layered_core_builder",
    "log_spaced_timescales",
    "restart",
    "selective_scan",
    "ssd_scan",
    "unroll",
]
