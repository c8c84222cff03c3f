"""A policy's step as a CUDA graph: one launch instead of dozens."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from cyborg_torchrl.collectors.flat_dict import FlatDict
from cyborg_torchrl.collectors.fused_policy import FusedPolicy, OpaquePolicy

Run = Callable[[], FlatDict]
"""A computation whose input and output tensors have fixed addresses."""
Capture = Callable[[Run], Callable[[], None]]
"""A function that returns the replay of such a computation."""
WARM_UPS = 3


class GraphedPolicy:
    """A `FusedPolicy` whose step is captured once a rollout and replayed at each step.

    A graph always reads and writes the same memory. So the inputs of a step are copied in, and its outputs are copied
    out before the next step overwrites them. The graph is captured once for each rollout, since `FusedPolicy.begin`
    computes new tensors from the parameters. The random numbers are those of a policy without a graph, since the
    generator is restored after the warm-up.

    Args:
        policy: a policy on a CUDA device.
        capture: captures the computation; None: `captured_on_cuda`.
    """

    def __init__(self, policy: FusedPolicy, capture: Capture | None = None) -> None:
        self.policy, self._capture = policy, captured_on_cuda if capture is None else capture
        self._inputs: FlatDict = {}
        self._outputs: FlatDict = {}
        self._replay: Callable[[], None] | None = None

    def begin(self, num_envs: int) -> None:
        """Prepare a rollout."""
        self.policy.begin(num_envs)
        self._replay = None

    def check(self, steps: FlatDict) -> None:
        """Check a rollout as the policy does."""
        self.policy.check(steps)

    def __call__(self, carried: FlatDict, *, may_begin: bool = True) -> FlatDict:
        """Return the entries that the policy writes; a graph ignores `may_begin`."""
        del may_begin
        if self._replay is None:
            self._inputs = {key: value.clone() for key, value in carried.items()}
            self._replay = self._capture(self._run)
        else:
            for key, value in self._inputs.items():
                if key in carried:  # the first step may have entries that the policy never reads
                    value.copy_(carried[key])
        self._replay()
        # Copies, since the next replay overwrites the outputs.
        return {key: value.clone() for key, value in self._outputs.items()}

    def _run(self) -> FlatDict:
        self._outputs = self.policy(self._inputs)
        return self._outputs


def with_graph(
    policy: FusedPolicy | OpaquePolicy, devices: Iterable[torch.device], cudagraph: bool | None
) -> FusedPolicy | OpaquePolicy | GraphedPolicy:
    """Return a policy's step as a CUDA graph.

    Args:
        policy: the step.
        devices: the devices of policy, environment and storage.
        cudagraph: True: an error if there can be no graph. None: no graph then. False: never a graph.

    Raises:
        ValueError: if `cudagraph` is true, but the policy is not fused, or is not on a CUDA device.
    """
    is_fused, found = isinstance(policy, FusedPolicy), sorted(set(map(str, devices)))
    if cudagraph is not False and is_fused and all(name.startswith("cuda") for name in found):
        return GraphedPolicy(policy)
    if cudagraph:
        here = f"here are {', '.join(found)}" if is_fused else "the policy here is called as a whole"
        raise ValueError(
            "cudagraph needs a policy that can be fused, and all of it, the environment too, on one CUDA device; "
            f"{here}."
        )
    return policy


def captured_on_cuda(run: Run) -> Callable[[], None]:
    """Capture a computation on the present CUDA device.

    Source: PyTorch's "CUDA semantics", section "CUDA Graphs": warm up on another stream, then capture.
    """
    # The warm-up draws random numbers. Its generator is restored, so that graph and no graph draw the same ones.
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
