"""Write a trained agent as a file that runs without this package and without TorchRL.

    cyborg-torchrl export runs/my-run --output agent.onnx       # for onnxruntime
    cyborg-torchrl export runs/my-run --output agent.pt2        # for torch.export.load

The file holds one step: from the observation, the memory state and `is_init` to the likeliest action, the parameters
of the policy's distribution and the next state. Its outputs are compared with the agent's before it is written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from cyborg_torchrl.cli.arguments import agent_of, checkpoint_parser
from cyborg_torchrl.export import (
    ExportError,
    OnnxRunner,
    StreamingStep,
    TorchRunner,
    build_program,
    describe,
    leave_autocast,
    normalizers_of,
    onnx_file,
    replay,
    torch_file,
    unnormalized,
)
from cyborg_torchrl.training.checkpoint import write_whole
from cyborg_torchrl.training.command import CommandParser, UsageError, positive, writable
from cyborg_torchrl.training.experiment import StoppedError
from cyborg_torchrl.training.loading import build_single_env
from cyborg_torchrl.training.progress import progress_bar

TOLERANCE = 1e-5
ENDINGS = {"onnx": ".onnx", "torch": ".pt2"}
ROWS = 4
"""Environments that a program of any batch size is compared in."""


def _parser() -> CommandParser:
    parser = checkpoint_parser("export", __doc__)
    program = partial(writable, endings=tuple(ENDINGS.values()))
    parser.add_argument("--output", type=program, required=True, metavar="FILE", help="ends in .onnx or .pt2")
    parser.add_argument("--format", choices=tuple(ENDINGS), help="default: what the file's ending says")
    parser.add_argument("--batch", type=_batch, metavar="N", help="rows of each input: a number, or dynamic (default)")
    parser.add_argument("--steps", type=positive, default=1000, help="steps that are compared (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export, compare and write. Return the exit code."""
    arguments = _parser().parse(argv)
    output: Path = arguments.output
    format_ = arguments.format or ("onnx" if output.suffix == ENDINGS["onnx"] else "torch")
    if output.suffix != ENDINGS[format_]:
        raise UsageError(f"--output must end in {ENDINGS[format_]} with --format {format_}; got '{output}'.")
    cfg, agent = agent_of(arguments, "train.device=cpu")
    if leave_autocast(agent):
        print(f"encoder.autocast={cfg.encoder.autocast}: exported, and compared, in float32", file=sys.stderr)
    try:
        with closing(build_single_env(cfg)) as env, closing(build_single_env(unnormalized(cfg))) as plain:
            step = StreamingStep(agent, normalizers_of(agent, env))
            description = describe(cfg, agent, plain)
            program = build_program(step, plain, arguments.batch)
        file = (onnx_file if format_ == "onnx" else torch_file)(program, description)
        runner = (OnnxRunner if format_ == "onnx" else TorchRunner)(file)
        with progress_bar("steps compared", arguments.steps) as show:
            rows = arguments.batch or ROWS
            found = replay(cfg, agent, runner, steps=arguments.steps, rows=rows, on_step=show)
    except ExportError as error:
        raise StoppedError(str(error)) from None
    if found.largest > TOLERANCE:
        raise StoppedError(
            f"the exported program differs from the agent by {found.largest:.1e}, more than {TOLERANCE:.0e}, in "
            f"{found.steps} steps; nothing was written."
        )
    try:
        write_whole(output, file)
    except OSError as error:
        raise UsageError(f"--output: cannot write '{output}' ({error.strerror}).") from None
    inputs = {name: each["shape"] for name, each in description["observation"].items()}
    state = {name: each["shape"] for name, each in description["state"].items()}
    print(f"{output}: {len(file):,} bytes; reads {inputs}, is_init and the state {state}")
    print(
        f"compared for {found.steps} steps of {rows} with {found.resets} resets: largest difference {found.largest:.1e}"
    )
    print(json.dumps({"output": str(output), "format": format_, "bytes": len(file), "rows": rows, **found._asdict()}))
    return 0


def _batch(text: str) -> int | None:
    return None if text == "dynamic" else positive(text)
