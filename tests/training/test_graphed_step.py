"""Optimiser steps as graphs: the same parameters bit by bit, few launches, and no number that the CPU waits for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded_operations import Launches, Recording, replace_everywhere
from torch import Tensor
from torch.nn import functional as F

from cyborg_torchrl.config import ConfigError, load_config
from cyborg_torchrl.cores.kernels import gated_recurrence, group_norm, gru, lstm, native, official_mamba
from cyborg_torchrl.cores.kernels.triton import launch, loading, resident
from cyborg_torchrl.modules.nan_check import NonFiniteError
from cyborg_torchrl.training import trainer as trainer_module
from cyborg_torchrl.training.builders import build_trainer
from cyborg_torchrl.training.graphed_step import CudaGraphs, GraphedStep

OPTIONS = [
    "env.horizon=9",
    "env.num_envs=8",
    "train.total_timesteps=200",
    "train.n_epochs=2",
    "train.num_minibatches=4",
]
RESETS = ["train=tbptt", "train.n_steps=30", "train.seq_len=30"]
LAUNCHES = {"lru": 150, "gru": 160, "lstm": 160, "mamba": 200, "mamba2": 200, "mamba_gru": 220}
"""Most launches of a minibatch, the choice of its rows included. One kernel counts as one."""
KERNELS = {"lru": ["gated_recurrence", "group_norm"], "gru": ["gru", "group_norm"], "lstm": ["lstm", "group_norm"]}
KERNELS |= {name: ["causal_conv", "selective_scan", "gated_readout"] for name in ("mamba", "mamba2")}
KERNELS["mamba_gru"] = [*KERNELS["mamba"], *KERNELS["gru"]]
CORES = ["lru", "gru", "lstm"]
"""Cores whose C++ kernels wait for nothing, so that their steps can be recorded."""


class RecordedGraphs(CudaGraphs):
    """A stand-in for CUDA graphs.

    As with a CUDA graph, Python does not run again: numbers, branches and addresses are those of the recording.
    Capturing changes nothing, since what an operation overwrote is put back.
    """

    def __init__(self) -> None:
        self.recordings: list[Recording] = []

    def warm_up(self, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        return run()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recordings.append(Recording.of(run))
        return self.recordings[-1].replay


@pytest.fixture
def visible_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let C++ kernels run as operators of torch, which a recording sees."""
    if not native.IS_BUILT:
        pytest.skip("without the C++ kernels, recurrences are loops of torch operations")

    def run_operator(name, sizes, inputs, outputs, is_init=None, eps=0.0, threads=None) -> None:
        native._operator(name, list(sizes), list(inputs), list(outputs), is_init, eps, threads)

    for module in (gated_recurrence, group_norm, gru, lstm):
        monkeypatch.setattr(module, "run", run_operator)


@pytest.fixture
def path_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors on a CPU take the path of a GPU. Each kernel is one operator, which writes zeros."""

    replace_everywhere(monkeypatch, native.is_native, lambda tensor: False)
    replace_everywhere(monkeypatch, loading.is_triton, lambda tensor: True)
    replace_everywhere(monkeypatch, launch.run, run_triton)
    for name in launch._LAUNCHES:
        monkeypatch.setitem(launch._LAUNCHES, name, write_zeros)
    monkeypatch.setitem(launch._LAUNCHES, "rms_norm", write_zeros)
    monkeypatch.setattr(official_mamba.Kernel, "choose", lambda *_: "triton")
    monkeypatch.setattr(resident, "shared_memory", lambda _: 2**20)
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight=None, eps=None: RMSNorm.apply(x.contiguous(), weight))


def run_triton(name, inputs, outputs, numbers=()) -> None:
    launch._operator(name, list(inputs), list(outputs), list(numbers))


def write_zeros(inputs, outputs, numbers) -> None:
    del inputs, numbers
    for output in outputs:
        output.zero_()


class RMSNorm(torch.autograd.Function):
    """Torch's norm as on a GPU, where it is one kernel in each direction. On a CPU it consists of other operations."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        y = torch.empty_like(x)
        run_triton("rms_norm", [x], [y])
        return y

    @staticmethod
    def backward(ctx, grad_y):
        grads = [None if tensor is None else torch.empty_like(tensor) for tensor in ctx.saved_tensors]
        run_triton("rms_norm", [grad_y.contiguous()], [grad for grad in grads if grad is not None])
        return tuple(grads)


def trained(graphs: Any, *overrides: str) -> tuple[list[torch.Tensor], list[dict[str, float]]]:
    """Return the parameters and the metrics of a run; `graphs` None: without graphs."""
    cfg = load_config(overrides=[*OPTIONS, *overrides])
    cfg.train.cudagraph = graphs is not None  # refused in a configuration without CUDA
    trainer, agent, _ = build_trainer(cfg)
    if graphs is not None:
        trainer._take_step = GraphedStep(trainer.step, graphs)
    metrics = [
        {name: value for name, value in update.items() if "seconds" not in name and "per_second" not in name}
        for update in trainer.run()
    ]
    return [p.detach() for p in agent.parameters()], metrics


@pytest.mark.usefixtures("visible_kernels")
@pytest.mark.parametrize("backbone", CORES)
@pytest.mark.parametrize("resets", [[], RESETS], ids=["episodes", "resets"])
def test_graph_and_no_graph_are_equal_bit_by_bit(backbone: str, resets: list[str]) -> None:
    graphs, overrides = RecordedGraphs(), [f"backbone={backbone}", *resets]
    expected, found = trained(None, *overrides), trained(graphs, *overrides)
    assert len(graphs.recordings) == 1
    assert all(torch.equal(first, second) for first, second in zip(expected[0], found[0], strict=True))
    assert found[1] == expected[1]


@pytest.mark.usefixtures("path_of_a_gpu")
@pytest.mark.parametrize("backbone", LAUNCHES)
@pytest.mark.filterwarnings("ignore:before the first optimiser step the update's log-probs differ")  # all are zeros
def test_a_minibatch_takes_few_launches_and_waits_for_nothing(backbone: str) -> None:
    trainer, _, _ = build_trainer(load_config(overrides=[*OPTIONS, f"backbone={backbone}", *RESETS]))
    trainer.update(trainer.collector.rollout())
    batches = iter(trainer.buffer)
    with Launches() as minibatch:
        trainer.step(next(batches))
    assert minibatch.waiting == []
    used = {name for kernel in KERNELS[backbone] for name in (kernel, f"{kernel}_backward")}
    assert {*minibatch.kernels} - {"rms_norm"} == used
    assert len(minibatch.launches) <= LAUNCHES[backbone], sorted(minibatch.launches)


def test_a_recording_sees_what_waits() -> None:
    with Launches() as recording:
        float(torch.ones(3).sum())
        torch.arange(3)[torch.tensor([True, False, True])]
        torch.ones(3).tolist()
    assert recording.waiting == ["_local_scalar_dense", "index", "tolist"]


@pytest.mark.usefixtures("visible_kernels")
def test_minibatches_with_a_mask_are_not_captured() -> None:
    graphs = RecordedGraphs()
    overrides = ["backbone=gru", "train=tbptt", "train.n_steps=10", "train.seq_len=4"]
    expected, found = trained(None, *overrides), trained(graphs, *overrides)
    assert graphs.recordings == []
    assert all(torch.equal(first, second) for first, second in zip(expected[0], found[0], strict=True))


@pytest.mark.usefixtures("visible_kernels")
def test_a_capture_that_fails_is_reported_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(RecordedGraphs):
        def capture(self, run):
            del run
            raise RuntimeError("operation not permitted when stream is capturing")

    expected = trained(None, "backbone=gru")
    with caplog.at_level(logging.WARNING):
        found = trained(Broken(), "backbone=gru")
    (record,) = [record for record in caplog.records if "train.cudagraph" in record.message]
    assert "not permitted when stream is capturing" in record.message
    assert all(torch.equal(first, second) for first, second in zip(expected[0], found[0], strict=True))


@pytest.mark.usefixtures("visible_kernels")
@pytest.mark.parametrize("has_graph", [False, True])
def test_after_a_gradient_that_is_not_finite_nothing_changes(has_graph: bool, monkeypatch) -> None:
    """In the second update one advantage is infinite. Parameters and optimiser stay as before its minibatch."""
    trainer, agent, _ = build_trainer(load_config(overrides=[*OPTIONS, "train.normalize_advantage=none"]))
    if has_graph:
        trainer._take_step = GraphedStep(trainer.step, RecordedGraphs())
    trainer.update(trainer.collector.rollout())
    add, states = trainer_module.add_advantages, []

    def infinite(steps, *arguments, **options):
        add(steps, *arguments, **options)
        steps["advantage"][5, 3] = torch.inf

    take = trainer._take_step

    def recorded(batch):
        states.append([value.clone() for value in agent.state_dict().values()])
        return take(batch)

    monkeypatch.setattr(trainer_module, "add_advantages", infinite)
    trainer._take_step = recorded
    with pytest.raises(NonFiniteError, match="in environment 5 at step 0 of the rollout"):
        trainer.update(trainer.collector.rollout())
    after = list(agent.state_dict().values())
    assert all(value.isfinite().all() for value in after)
    changes = [any(not torch.equal(a, b) for a, b in zip(first, after, strict=True)) for first in states]
    assert changes == sorted(changes, reverse=True), "after the first equal state all are equal"
    assert changes.count(False) >= 1
    trainer.step.start()
    assert not trainer.step._stopped, "the next update takes steps again"


@pytest.mark.parametrize("overrides", [["train.cudagraph=true"], ["train.cudagraph=true", "train.optimizer=rmsprop"]])
def test_a_graph_that_cannot_be_is_refused(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"train\.cudagraph needs train\.device=cuda"):
        load_config(overrides=overrides)
