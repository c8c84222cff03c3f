"""Runners of exported files, one step at a time."""

from __future__ import annotations

import io
import json
from typing import Any

import torch
from torch import Tensor

from cyborg_torchrl.export.description import METADATA
from cyborg_torchrl.export.programs import EXTRA, ExportError
from cyborg_torchrl.registry import UnavailableError

FlatDict = dict[str, Tensor]


class TorchRunner:
    """Runner of a torch.export file.

    Args:
        file: content of the file.
    """

    def __init__(self, file: bytes) -> None:
        extra = {f"{METADATA}.json": ""}
        self._step = torch.export.load(io.BytesIO(file), extra_files=extra).module()
        self.description = json.loads(extra[f"{METADATA}.json"])

    def __call__(self, observation: FlatDict, state: FlatDict, is_init: Tensor) -> dict[str, Any]:
        """Take one step; inputs and outputs are those of `StreamingStep`."""
        return self._step(observation, state, is_init)


class OnnxRunner:
    """Runner of an ONNX file by onnxruntime, on the CPU.

    Args:
        file: content of the file.

    Raises:
        UnavailableError: if onnxruntime is missing.
        ExportError: if onnxruntime cannot run the file.
    """

    def __init__(self, file: bytes) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise UnavailableError(f"checking an ONNX file needs onnxruntime: {EXTRA}") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises many kinds
            raise ExportError(f"onnxruntime does not run it: {' '.join(str(error).split())[:300]}") from error
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.description = json.loads(self._session.get_modelmeta().custom_metadata_map[METADATA])

    def __call__(self, observation: FlatDict, state: FlatDict, is_init: Tensor) -> dict[str, Any]:
        """Take one step, as `TorchRunner` does."""
        inputs = observation | {f"state.{name}": value for name, value in state.items()} | {"is_init": is_init}
        arrays = self._session.run(None, {name: value.numpy(force=True) for name, value in inputs.items()})
        results = {name: torch.from_numpy(array) for name, array in zip(self._outputs, arrays, strict=True)}
        following = {name: results.pop(f"next_state.{name}") for name in state}
        return {**results, "state": following}


Runner = TorchRunner | OnnxRunner
"""An exported program together with its runtime."""
