"""Optimiser steps as CUDA graphs: one launch for each minibatch instead of hundreds."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor

from cyborg_torchrl import keys
from cyborg_torchrl.training.optimizer_step import OptimizerStep

LOGGER = logging.getLogger(__name__)
WARM_UPS = 3
MAX_GRAPHS = 4
"""Graphs that are kept; each has memory of its size."""
Shapes = tuple[tuple[object, ...], ...]


class CudaGraphs:
    """CUDA graphs on the present device.

    Source: PyTorch's "CUDA semantics", section "CUDA Graphs": warm up on another stream, then capture.
    """

    def warm_up(self, run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Run a computation that will be captured later, on another stream as the capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = run()
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record a computation without running it, and return its replay."""
        graph = torch.cuda.CUDAGraph()
        # If a capture fails, torch leaves its stream current; the outer `stream` restores ours. Another thread may
        # collect meanwhile, hence "thread_local".
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            run()
        return graph.replay


class GraphedStep:
    """An `OptimizerStep` that is captured once for minibatches of a shape, and replayed for each of them.

    The first steps of a shape are taken without a graph, as the warm-up that a capture needs; no step is taken twice
    or thrown away. Parameters are the same bit by bit as without graphs. A minibatch with a mask or burn-in, and one
    of a fifth shape, is never captured. If a capture fails, a warning names the cause, and all steps are taken without
    graphs.

    Args:
        step: the step to capture. Its optimiser is capturable.
        graphs: what captures; None: CUDA graphs.
    """

    def __init__(self, step: OptimizerStep, graphs: CudaGraphs | None = None) -> None:
        self.step, self._graphs = step, CudaGraphs() if graphs is None else graphs
        self._captured: dict[Shapes, _Captured] = {}
        self._seen = Counter[Shapes]()
        self._is_refused = False

    def __call__(self, batch: TensorDictBase | None) -> dict[str, Tensor]:
        """Take a step on a minibatch, as `OptimizerStep` does."""
        if batch is None or self._is_refused or keys.TRAIN_MASK in batch.keys(True) or keys.BURN_IN in batch.keys(True):
            return self.step(batch)
        shapes = _shapes(batch)
        if shapes not in self._captured:
            if self._seen[shapes] < WARM_UPS or len(self._captured) == MAX_GRAPHS:
                self._seen[shapes] += 1
                return self._graphs.warm_up(lambda: self.step(batch))
            try:
                self._captured[shapes] = _Captured(self.step, batch, self._graphs)
            except RuntimeError as error:
                self._is_refused = True
                LOGGER.warning("train.cudagraph: the optimiser step cannot be captured, so it runs without: %s", error)
                return self.step(batch)
        return self._captured[shapes](batch)


class _Captured:
    """The graph of a step on minibatches of one shape."""

    def __init__(self, step: OptimizerStep, batch: TensorDictBase, graphs: CudaGraphs) -> None:
        # States are views that repeat one step; a copy in full would be as many times larger.
        self._batch = batch.apply(_copy_of_view)
        self._names: list[str] = []
        self._values = torch.empty(0)

        def run() -> None:
            metrics = step(self._batch)
            self._names, self._values = list(metrics), torch.stack([value.float() for value in metrics.values()])

        self._replay = graphs.capture(run)

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        for key, value in self._batch.items(True, True):
            _base(value).copy_(_base(batch.get(key)))
        self._replay()
        return dict(zip(self._names, self._values.clone().unbind(), strict=True))


def _copy_of_view(value: Tensor) -> Tensor:
    return _base(value).clone().expand_as(value)


def _base(value: Tensor) -> Tensor:
    """Return the part of a tensor that an expanded view repeats."""
    repeated = [stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)]
    return value[tuple(slice(0, 1) if is_repeated else slice(None) for is_repeated in repeated)]


def _shapes(batch: TensorDictBase) -> Shapes:
    return tuple((str(key), value.shape, value.stride(), value.dtype) for key, value in batch.items(True, True))
