"""The kernels alone: their times, and the same bits whether a sequence is computed as a whole or step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.sequences import training
from benchmarks.gpu.timing import Row, Run, Subject, milliseconds, timed, warm_up
from cyborg_torchrl.cores import causal_conv, gated_linear_scan, gated_readout, gru, lru, lstm, mamba, mamba2
from cyborg_torchrl.cores.kernels.choice import kernel_for
from cyborg_torchrl.cores.kernels.triton import gru as gru_kernel
from cyborg_torchrl.cores.kernels.triton import lstm as lstm_kernel
from cyborg_torchrl.cores.kernels.triton import resident
from cyborg_torchrl.cores.timescale import build_readout
from cyborg_torchrl.objectives.functional import generalized_advantage

Sizes = tuple[int, int, int]
"""Steps, rows and width."""
SIZES = [(128, 64, 128), (128, 1024, 128), (1000, 64, 64), (64, 8192, 256)]
EXACT, SMOKE = (100, 64, 128), (4, 3, 8)
ROWS = (1, 8, 16)
"""Rows of a program that are tried instead of the default."""
NUMBERS, TAPS, HEAD_WIDTH, GROUPS = 16, 4, 8, 16
"""Sizes of the Mamba blocks: numbers of a channel, steps of the convolution, channels of a head, groups of the norm."""


def normal(*shapes: Sequence[int], scale: float = 1.0) -> list[Tensor]:
    """Draw tensors that need a gradient."""
    return [(scale * torch.randn(*shape)).requires_grad_() for shape in shapes]


def _lru_floats(steps: int, rows: int, width: int) -> list[Tensor]:
    inputs, h_0, initial = normal((steps, rows, 3 * width), (rows, width), (rows, width))
    return [inputs, torch.logspace(-5, 0, width).requires_grad_(), h_0, initial]


def _linear_floats(steps: int, rows: int, width: int) -> list[Tensor]:
    return [torch.rand(steps, rows, width).requires_grad_(), *normal((steps, rows, width), *[(rows, width)] * 2)]


def _gru_floats(steps: int, rows: int, width: int) -> list[Tensor]:
    shapes = [(steps, rows, 3 * width), (3 * width, width), (3 * width,), *[(rows, width)] * 2]
    return normal(*shapes, scale=width**-0.25)


def _lstm_floats(steps: int, rows: int, width: int) -> list[Tensor]:
    return normal((steps, rows, 4 * width), (4 * width, width), *[(rows, width)] * 4, scale=width**-0.25)


def _selective_floats(steps: int, rows: int, width: int) -> list[Tensor]:
    channels = 2 * width
    u, b, c, h_0, initial = normal(
        (steps, rows, channels), *[(steps, rows, NUMBERS)] * 2, *[(rows, channels, NUMBERS)] * 2
    )
    delta = (0.1 * torch.rand(steps, rows, channels)).requires_grad_()
    a = (-torch.rand(channels, NUMBERS) - 0.1).requires_grad_()
    return [u, delta, a, b, c, h_0, initial]


def _ssd_floats(steps: int, rows: int, width: int) -> list[Tensor]:
    heads = 2 * width // HEAD_WIDTH
    u, b, c, h_0, initial = normal(
        (steps, rows, heads, HEAD_WIDTH),
        *[(steps, rows, NUMBERS)] * 2,
        *[(rows, heads, HEAD_WIDTH, NUMBERS)] * 2,
    )
    delta = (0.1 * torch.rand(steps, rows, heads)).requires_grad_()
    return [u, delta, (-torch.rand(heads) - 0.1).requires_grad_(), b, c, h_0, initial]


def _conv_floats(steps: int, rows: int, width: int) -> list[Tensor]:
    channels = 2 * width
    return normal((steps, rows, channels), (channels, TAPS), (channels,), *[(rows, channels, TAPS)] * 2)


class Recurrence(NamedTuple):
    """A kernel over sequences. It takes floats, of which the last are stored states, is_init and initial states."""

    floats: Callable[[int, int, int], list[Tensor]]
    paths: Mapping[str, Callable[..., Any]]
    """By the name of `kernel_for`; or the choice is within the one function `torch`."""
    num_states: int = 1
    returns_state: bool = False

    def __call__(self, floats: Sequence[Tensor], is_init: Tensor) -> list[Tensor]:
        """Return the outputs of each step, and the last state if `returns_state`."""
        path = self.paths.get(kernel_for(floats[0]), self.paths["torch"])
        outputs = path(*floats[: -self.num_states], is_init, *floats[-self.num_states :])
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)


RECURRENCES = {
    "lru": Recurrence(_lru_floats, lru.RECURRENCES),
    "linear scan": Recurrence(_linear_floats, {"torch": gated_linear_scan}),
    "gru": Recurrence(_gru_floats, gru.RECURRENCES),
    "lstm": Recurrence(_lstm_floats, lstm.RECURRENCES, num_states=2),
    "selective scan": Recurrence(_selective_floats, mamba.SCANS, returns_state=True),
    "SSD scan": Recurrence(_ssd_floats, mamba2.SCANS, returns_state=True),
    "convolution": Recurrence(_conv_floats, {"torch": causal_conv.causal_conv}, returns_state=True),
}
WITHOUT_CPU_KERNEL = ("SSD scan", "convolution")


@torch.no_grad()
def steps_and_sequences(device: torch.device, is_smoke: bool) -> Iterator[Row]:
    """Compare a sequence, with resets and a stored state, with its steps bit by bit."""
    for name, recurrence in RECURRENCES.items():
        row: Row = {"check": "T = 1 and T = n", "subject": name}
        if device.type == "cpu" and name in WITHOUT_CPU_KERNEL:
            yield row | {"left_out": "a CPU computes steps with other code"}
            continue
        equal, largest = same_as_steps(recurrence, SMOKE if is_smoke else EXACT, device)
        yield row | {"is_equal": equal, "largest_difference": largest}


def same_as_steps(recurrence: Recurrence, sizes: Sizes, device: torch.device) -> tuple[bool, float]:
    """Return whether a sequence equals its steps bit by bit, and their largest difference."""
    steps, rows, _ = sizes
    floats, is_init = _drawn(recurrence, sizes, device)
    whole = recurrence(floats, is_init)
    k = recurrence.num_states
    *inputs, initial = [*floats[: -2 * k], floats[-k:]]
    state, largest, is_equal = floats[-2 * k : -k], 0.0, True
    for t in range(steps):
        of_step = [x[t : t + 1] if x.ndim > 2 and x.shape[:2] == (steps, rows) else x for x in inputs]
        outputs = recurrence([*of_step, *state, *initial], is_init[t : t + 1])
        is_equal &= torch.equal(outputs[0][0], whole[0][t])
        largest = max(largest, float((outputs[0][0] - whole[0][t]).abs().max()))
        state = [outputs[1]] if recurrence.returns_state else [output[0] for output in outputs]
    if recurrence.returns_state:
        is_equal &= torch.equal(state[0], whole[1])
    return is_equal, largest


def _drawn(recurrence: Recurrence, sizes: Sizes, device: torch.device) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    with device:
        return recurrence.floats(*sizes), torch.rand(sizes[0], sizes[1]) < 0.1


def kernels(device: torch.device, is_smoke: bool) -> Iterator[Row]:
    """Time every kernel forward and backward at several sizes, with 10 % resets, and the ceilings of the machine."""
    yield from _ceilings(device, 64 if is_smoke else 8192)
    for sizes in [SMOKE] if is_smoke else SIZES:
        about = {"sizes": list(sizes)}
        for name, recurrence in RECURRENCES.items():
            yield from timed(Subject(name, partial(_build, recurrence, sizes, device)), device, about)
        for name, build in {"norm": _norm, "gated read-out": _readout, "advantages": _advantages}.items():
            yield from timed(Subject(name, partial(build, sizes, device)), device, about)
    for sizes in [SMOKE] if is_smoke else SIZES[:2]:
        yield from _other_rows(sizes, device)


def _build(recurrence: Recurrence, sizes: Sizes, device: torch.device) -> Run:
    floats, is_init = _drawn(recurrence, sizes, device)
    return training(lambda: recurrence(floats, is_init)[0], floats)


def _norm(sizes: Sizes, device: torch.device) -> Run:
    with device:
        norm, x = build_readout("timescale_norm", sizes[2], GROUPS).to(device), *normal(sizes)
    return training(lambda: norm(x), [x])


def _readout(sizes: Sizes, device: torch.device) -> Run:
    channels = 2 * sizes[2]
    with device:
        floats = normal(*[(*sizes[:2], channels)] * 3, (channels,))
        norm = build_readout("timescale_norm", channels, GROUPS, torch.rand(channels) + 0.5).to(device)
    return training(lambda: gated_readout.gated_readout(*floats, norm), floats)


def _advantages(sizes: Sizes, device: torch.device) -> Run:
    steps, rows, _ = sizes
    reward, value, following = torch.randn(3, rows, steps, device=device)
    ended = torch.rand(rows, steps, device=device) < 0.1
    return lambda: generalized_advantage(reward, value, following, ended, ended, 0.99, 0.95)


def _other_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Time `gru` and `lstm` with other numbers of rows in a program. The package uses one number for all batches."""
    for name, module in {"gru": gru_kernel, "lstm": lstm_kernel}.items():
        for rows in ROWS:

            def constants(size: int, rows: int = rows) -> dict[str, Any]:
                return {**resident.constants(size), "ROWS": rows}

            build = partial(_build, RECURRENCES[name], sizes, device)
            subject = Subject(f"{name}, {rows} rows a program", build, is_ours=False)  # may not fit into the GPU
            with mock.patch.object(module, "constants", constants):
                yield from timed(subject, device, {"sizes": list(sizes)})


def _ceilings(device: torch.device, size: int) -> Iterator[Row]:
    """Measure how fast this machine copies and multiplies."""
    x, y = torch.randn(2, size, size, device=device)
    for name, run, amount, unit in (
        ("copy, read and write", lambda: y.copy_(x), 2 * x.nbytes / 1e9, "GB/s"),
        ("float32 product", lambda: torch.mm(x, x, out=y), 2 * size**3 / 1e12, "TFLOP/s"),
    ):
        warm_up(run, device)
        row = milliseconds(run, device)
        yield {"ceiling": name, **row, "value": 1e3 * amount / row["ms"], "unit": unit}
