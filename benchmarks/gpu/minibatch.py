"""An optimiser step on one minibatch: launches, operations that wait for the GPU, and its time in a CUDA graph."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.timing import Row, Run, Subject, reason_of, timed
from cyborg_torchrl.config import load_config
from cyborg_torchrl.training.builders import build_trainer
from cyborg_torchrl.training.graphed_step import WARM_UPS, GraphedStep

BACKBONES = ("lru", "gru", "lstm", "mamba", "mamba2", "pmm")
SMOKE = ["env.horizon=5", "env.num_envs=4", "backbone.hidden_size=8", "train.num_minibatches=2"]
LAUNCH = re.compile(r"^(?:cuda|cu)(?:Launch|GraphLaunch|Memcpy|Memset)")


def minibatches(device: torch.device, is_smoke: bool) -> Iterator[Row]:
    """Measure a step of the default run with several cores."""
    for backbone in BACKBONES:
        overrides = [f"backbone={backbone}", f"train.device={device}", "train.n_epochs=1", "train.learning_rate=1e-9"]
        try:
            yield from _measure(backbone, [*overrides, *(SMOKE if is_smoke else [])], device)
        except Exception as error:
            yield {"backbone": backbone, "error": reason_of(error)}


def _measure(backbone: str, overrides: list[str], device: torch.device) -> Iterator[Row]:
    trainer = build_trainer(load_config(overrides=overrides)).trainer
    trainer._take_step = trainer.step  # a graph is captured below, if nothing waits
    trainer.update(next(iter(trainer.collector)))
    batches = iter(trainer.buffer)
    batch = next(batches)

    def step() -> None:
        trainer.step(batch)

    step()
    places = waits(step, device)
    yield {"backbone": backbone, "launches": launches(step, device), "waits": places}
    yield {"backbone": backbone, "launches_to_choose_rows": launches(lambda: next(batches), device)}
    yield next(timed(Subject("optimiser step", lambda: step), device, {"backbone": backbone}))
    graph: Row = {"backbone": backbone, "subject": "optimiser step in a graph"}
    if places or device.type != "cuda":
        yield {**graph, "left_out": "the step waits for the GPU" if places else "a CPU has no CUDA graphs"}
    else:
        graphed = GraphedStep(trainer.step)
        for _ in range(WARM_UPS + 1):
            graphed(batch)
        replay = Subject(graph["subject"], lambda: lambda: graphed(batch))
        row = next(timed(replay, device, {"backbone": backbone}))
        yield {**row, "launches": launches(lambda: graphed(batch), device)}


def launches(run: Run, device: torch.device) -> int | None:
    """Return the launches and copies that a computation starts; None on a CPU."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as record:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    number = sum(LAUNCH.match(event.name) is not None for event in record.events())
    return number if device.type == "cuda" else None


def waits(run: Run, device: torch.device) -> list[str]:
    """Return the places where a computation makes the host wait for the GPU."""
    if device.type != "cuda":
        run()
        return []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = (f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message))
    return sorted(set(places))
