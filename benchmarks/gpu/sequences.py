"""Forward and backward passes of sequences: our cores, cuDNN, and the kernels of TorchRL and mamba-ssm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import GRUModule, LSTMModule

from benchmarks.gpu.timing import Row, Run, Subject, timed
from cyborg_torchrl.cores import Core, Mamba2Block, MambaBlock
from cyborg_torchrl.registry import backbones, memories

RESETS = (0.0, 0.01, 0.1)
"""Shares of steps at which an episode begins."""
CUDNN = {"gru": nn.GRU, "lstm": nn.LSTM}
TORCHRL = {"gru": GRUModule, "lstm": LSTMModule}
STATES = {"gru": ["h"], "lstm": ["h", "c"]}


class Shape(NamedTuple):
    """Sizes of sequences."""

    rows: int
    steps: int
    features: int
    width: int = 128


SHORT, LONG, MANY = Shape(64, 128, 64), Shape(2048, 256, 128), Shape(1024, 128, 128)
SMOKE = Shape(3, 4, 8, 8)


class Batch(NamedTuple):
    """Inputs [B, T, F] and flags [B, T]."""

    x: Tensor
    is_init: Tensor
    resets: float
    """Share of the flags that are set."""

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return self.x.device


def draw(shape: Shape, resets: float, device: torch.device) -> Batch:
    """Draw a batch."""
    torch.manual_seed(0)
    x = torch.randn(shape.rows, shape.steps, shape.features, device=device, requires_grad=True)
    return Batch(x, torch.rand(shape.rows, shape.steps, device=device) < resets, resets)


def training(forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Run:
    """Build the forward and backward pass of a network, with the gradients of its inputs and parameters."""
    weight = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, weight, allow_unused=True)


def ours(build: Callable[[], Core], batch: Batch) -> Run:
    """Build a pass of one of our cores, from its initial state."""
    core = build().to(batch.device)

    def forward() -> Tensor:
        return core(batch.x, core.initial_state(len(batch.x)), batch.is_init)[0]

    return training(forward, [batch.x, *core.parameters()])


def cudnn(kind: str, batch: Batch, width: int) -> Run:
    """Build a pass of torch's network, which cannot reset its state within a sequence."""
    module = CUDNN[kind](batch.x.shape[-1], width, batch_first=True).to(batch.device)
    return training(lambda: module(batch.x)[0], [batch.x, *module.parameters()])


def torchrl(kind: str, backend: str, batch: Batch, width: int) -> Run:
    """Build a pass of TorchRL's module. The backend `pad` splits rows at resets and calls cuDNN."""
    states = STATES[kind]
    module = TORCHRL[kind](
        input_size=batch.x.shape[-1],
        hidden_size=width,
        in_keys=["x", *states],
        out_keys=["y", *(("next", name) for name in states)],
        recurrent_backend=backend,
        recurrent_matmul_precision="tf32",  # the fastest, by their documentation
        default_recurrent_mode=True,
    ).to(batch.device)
    size = batch.x.shape[:2]
    zero = torch.zeros(*size, 1, width, device=batch.device)
    entries = {"x": batch.x, "is_init": batch.is_init.unsqueeze(-1), **dict.fromkeys(states, zero)}
    return training(lambda: module(TensorDict(entries, size))["y"], [batch.x, *module.parameters()])


def others(kind: str, batch: Batch, width: int) -> Iterator[Subject]:
    """Yield the networks that `gru` or `lstm` is compared with."""
    title = kind.upper()
    for allow_tf32 in (True, False):
        about = "TF32" if allow_tf32 else "float32"
        if batch.resets:
            name, build = f"cuDNN {title} on padded episodes, {about}", partial(torchrl, kind, "pad", batch, width)
        else:
            name, build = f"cuDNN {title}, {about}", partial(cudnn, kind, batch, width)
        yield Subject(name, build, is_ours=False, allow_tf32=allow_tf32)
    yield Subject(f"TorchRL {title}, Triton", partial(torchrl, kind, "triton", batch, width), is_ours=False)


def core_subject(name: str, features: int, width: int, batch: Batch) -> Subject:
    """Return one of our cores as a subject."""
    return Subject(name, partial(ours, partial(backbones.get(name), features, hidden_size=width), batch))


def sequences(device: torch.device, is_smoke: bool) -> Iterator[Row]:
    """Time `lru`, `gru`, `lstm` and the Mamba blocks on short sequences, with and without resets."""
    shape = SMOKE if is_smoke else SHORT
    cases: list[tuple[float, Subject]] = []
    for resets in RESETS:
        batch = draw(shape, resets, device)
        # A Mamba block has as many outputs as inputs.
        wide = draw(shape._replace(features=shape.width), resets, device)
        subjects = [core_subject(name, shape.features, shape.width, batch) for name in ("lru", "gru", "lstm")]
        for name, block in (("mamba", MambaBlock), ("mamba2", Mamba2Block)):
            subjects.append(Subject(f"{name} block", partial(ours, partial(block, shape.width), wide)))
            official = partial(block, shape.width, kernel="cuda")
            subjects.append(Subject(f"{name} block, mamba-ssm's kernel", partial(ours, official, wide), is_ours=False))
        subjects += [*others("gru", batch, shape.width), *others("lstm", batch, shape.width)]
        cases += [(resets, subject) for subject in subjects]
    yield from _timed_all(cases, shape, device)


def large(device: torch.device, is_smoke: bool) -> Iterator[Row]:
    """Time `gru` on many long sequences, with and without resets."""
    shape = SMOKE if is_smoke else LONG
    cases: list[tuple[float, Subject]] = []
    for resets in RESETS:
        batch = draw(shape, resets, device)
        cases.append((resets, core_subject("gru", shape.features, shape.width, batch)))
        cases += [(resets, subject) for subject in others("gru", batch, shape.width)]
    yield from _timed_all(cases, shape, device)


def cores(device: torch.device, is_smoke: bool) -> Iterator[Row]:
    """Time every core, and cuDNN's GRU, on many short sequences."""
    shape = SMOKE if is_smoke else MANY
    batch = draw(shape, 0.0, device)

    def with_pmm() -> Core:
        return memories.get("pmm")(backbones.get("lru")(shape.features, hidden_size=shape.width))

    subjects = [subject for subject in others("gru", batch, shape.width) if subject.name.startswith("cuDNN")]
    names = [name for name in backbones.names() if backbones.get(name).__module__.startswith("cyborg_torchrl.")]
    subjects += [core_subject(name, shape.features, shape.width, batch) for name in names]
    subjects.append(Subject("lru with pmm", partial(ours, with_pmm, batch)))
    yield from _timed_all([(0.0, subject) for subject in subjects], shape, device)


def _timed_all(cases: list[tuple[float, Subject]], shape: Shape, device: torch.device) -> Iterator[Row]:
    """Time all subjects, given with their share of resets. TorchRL's kernels, which tune themselves, are the last."""
    for resets, subject in sorted(cases, key=lambda case: case[1].name.startswith("TorchRL")):
        yield from timed(subject, device, {"shape": list(shape), "resets": resets})
