"""A policy's step as a CUDA graph: one launch in place of dozens."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cyborg_torchrl.collectors.flat_dict import Entries
from cyborg_torchrl.collectors.fused_policy import FusedPolicy

Run = Callable[[], Entries]
"""Computes, from tensors that stay where they are to others that do."""
Capture = Callable[[Run], Callable[[], None]]
"""Makes of such a computation what repeats it, in the same tensors."""
WARM_UPS = 3


class GraphedPolicy:
    """A `FusedPolicy` whose step is captured once a rollout and replayed at each step.

    A graph reads and writes the same memory each time: what a step reads is copied there, and what it writes is copied
    out, before the next step overwrites it. It is captured anew for each rollout, since what is computed from the
    parameters beforehand (`FusedPolicy.begin`) lies elsewhere after an update. Random numbers are those that the policy
    would draw without it: warming up gives back what it drew.

    Args:
        policy: on a CUDA device.
        capture: how; None: `captured_on_cuda`.
    """

    def __init__(self, policy: FusedPolicy, capture: Capture | None = None) -> None:
        self.policy, self._capture = policy, captured_on_cuda if capture is None else capture
        self._inputs: Entries = {}
        self._outputs: Entries = {}
        self._replay: Callable[[], None] | None = None

    def begin(self, num_envs: int) -> None:
        """Called before a rollout."""
        self.policy.begin(num_envs)
        self._replay = None

    def check(self, steps: Entries) -> None:
        """As the policy does."""
        self.policy.check(steps)

    def __call__(self, carried: Entries, *, may_begin: bool = True) -> Entries:
        """What the policy writes, for the entries before a step; a graph takes no notice of `may_begin`."""
        del may_begin
        if self._replay is None:
            self._inputs = {key: value.clone() for key, value in carried.items()}
            self._replay = self._capture(self._run)
        else:
            for key, value in self._inputs.items():
                if key in carried:  # what a rollout begins with may hold what the policy wrote, and never reads
                    value.copy_(carried[key])
        self._replay()
        return {key: value.clone() for key, value in self._outputs.items()}

    def _run(self) -> Entries:
        self._outputs = self.policy(self._inputs)
        return self._outputs


def captured_on_cuda(run: Run) -> Callable[[], None]:
    """Captures a computation on the present CUDA device.

    Source: the recipe of PyTorch's "CUDA semantics", section "CUDA Graphs": warm up on a stream of its own, then
    capture.
    """
    random_state = torch.cuda.get_rng_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_rng_state(random_state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
