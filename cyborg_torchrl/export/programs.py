"""Programs of torch operations from a streaming step, and their files."""

from __future__ import annotations

import io
import json
import logging
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torchrl.envs import EnvBase

from cyborg_torchrl.export.description import METADATA
from cyborg_torchrl.export.onnx_ops import ACCURATE
from cyborg_torchrl.export.streaming_step import StreamingStep
from cyborg_torchrl.registry import UnavailableError

EXTRA = "pip install 'cyborg-torchrl[export]'"


class ExportError(RuntimeError):
    """An agent that cannot be exported, or whose program differs from it; the message is one line."""


def build_program(step: StreamingStep, env: EnvBase, batch: int | None = None) -> ExportedProgram:
    """Trace a step.

    Args:
        step: the step, on the CPU.
        env: environment without normalisation, which gives the shapes of observations.
        batch: rows of every input; None: any number.

    Raises:
        ExportError: if torch cannot trace it.
    """
    rows = 2 if batch is None else batch  # torch would treat 1 as a constant
    dims = len(env.batch_size)
    shown = {name: env.observation_spec[key] for name, key in step.observation_keys.items()}
    observation = {name: torch.zeros(rows, *spec.shape[dims:], dtype=spec.dtype) for name, spec in shown.items()}
    state = {name: value.detach().clone() for name, value in step.core.initial_state(rows).items()}
    is_init = torch.ones(rows, dtype=torch.bool)
    any_number = {0: Dim("batch")} if batch is None else None
    shapes = (dict.fromkeys(observation, any_number), dict.fromkeys(state, any_number), any_number)
    try:
        with torch.no_grad():
            return torch.export.export(step, (observation, state, is_init), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # a third-party core may raise anything
        raise ExportError(f"the agent cannot be exported: {_first_line(error)}") from error


def torch_file(program: ExportedProgram, description: dict[str, Any]) -> bytes:
    """Return the file for `torch.export.load`, with the description as an extra file."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={f"{METADATA}.json": json.dumps(description)})
    return file.getvalue()


def onnx_file(program: ExportedProgram, description: dict[str, Any]) -> bytes:
    """Return the ONNX file, with the description in its metadata.

    Inputs: the observations by their names, "state.NAME" for each tensor of the state, "is_init". Outputs: "action",
    the distribution's parameters by their names, "next_state.NAME".

    Raises:
        UnavailableError: if onnx or onnxscript is missing.
        ExportError: if ONNX lacks an operation.
    """
    try:
        import onnx  # noqa: F401
        from onnxscript import optimizer
    except ImportError as error:
        raise UnavailableError(f"ONNX files need {error.name}: {EXTRA}") from None
    state = list(description["state"])
    names = [*description["observation"], *(f"state.{name}" for name in state), "is_init"]
    results = ["action", *description["parameters"], *(f"next_state.{name}" for name in state)]
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it reports each missing operation of torchvision
    try:
        with warnings.catch_warnings(action="ignore"):  # warnings for the exporter's authors
            made = torch.onnx.export(
                program.run_decompositions(ACCURATE),
                dynamo=True,
                input_names=names,
                output_names=results,
                optimize=False,  # the optimiser would drop an epsilon of 1e-12
                verbose=False,
            )
            assert made is not None
            optimizer.inline(made.model)
            optimizer.fold_constants(made.model)
            optimizer.remove_unused_nodes(made.model)
    except Exception as error:  # the exporter raises many kinds
        raise ExportError(f"the agent cannot be written as ONNX: {_first_line(error.__cause__ or error)}") from error
    finally:
        logger.setLevel(level)
    made.model.metadata_props[METADATA] = json.dumps(description)
    return made.model_proto.SerializeToString()


def example_inputs(description: dict[str, Any], rows: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return zeros for all inputs, and flags of a first step."""
    observation, state = (
        {name: torch.zeros(rows, *each["shape"], dtype=getattr(torch, each["dtype"])) for name, each in entries.items()}
        for entries in (description["observation"], description["state"])
    )
    return observation, state, torch.ones(rows, dtype=torch.bool)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
