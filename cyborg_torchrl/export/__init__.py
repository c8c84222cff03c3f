"""Export of agents to programs that run without this package, one step at a time."""

from cyborg_torchrl.export.comparison import Differences, replay, unnormalized
from cyborg_torchrl.export.description import describe
from cyborg_torchrl.export.parity import OnnxRunner, Runner, TorchRunner
from cyborg_torchrl.export.programs import ExportError, build_program, onnx_file, torch_file
from cyborg_torchrl.export.streaming_step import StreamingStep, leave_autocast, normalizers_of

__all__ = [
    "Differences",
    "ExportError",
    "OnnxRunner",
    "Runner",
    "StreamingStep",
    "TorchRunner",
    "build_program",
    "describe",
    "leave_autocast",
    "normalizers_of",
    "onnx_file",
    "replay",
    "torch_file",
    "unnormalized",
]
