"""Steps of a policy, and of a memory task, as a CUDA graph: one launch instead of dozens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from cyborg_torchrl import keys
from cyborg_torchrl.collectors.flat_dict import FlatDict
from cyborg_torchrl.collectors.fused_env import EnvStep, FusedEnv, Step
from cyborg_torchrl.collectors.fused_policy import FusedPolicy, PolicyStep
from cyborg_torchrl.envs.memory.task import MemoryTask

LOGGER = logging.getLogger(__name__)
Run = Callable[[], FlatDict]
"""A computation whose input and output tensors have fixed addresses."""
Capture = Callable[[Run, Callable[[], None]], Callable[[], None]]
"""A function that returns the replay of such a computation. The second function loads the inputs again."""
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
            self._replay = self._capture(self._run, lambda: None)
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


class GraphedTask:
    """A `FusedPolicy` and a memory task whose steps are one graph, captured once a rollout.

    A collector calls it as a policy, and calls its `step` as that of an environment. A replay computes both, and writes
    what the next replay reads. So only the results are copied, out of the graph's memory.

    Resets are not in the graph. They draw from the task's own generator, and only if an episode ends. So the random
    numbers are those of a rollout without a graph. If all episodes end together, the CPU counts their steps. Otherwise
    it reads after each step if one has ended.

    If the steps cannot be captured, a warning names the cause, and only the policy's step becomes a graph.

    Args:
        policy: a policy on a CUDA device.
        env: the task with its transforms.
        task: the task.
        capture: captures the computation; None: `captured_on_cuda`.
    """

    is_ever_cut = False

    def __init__(self, policy: FusedPolicy, env: FusedEnv, task: MemoryTask, capture: Capture | None = None) -> None:
        self.policy, self.env, self._task = policy, env, task
        self._capture = captured_on_cuda if capture is None else capture
        self._policy_alone: GraphedPolicy | None = None
        """The policy's graph, if there is none of both."""
        self._inputs: FlatDict = {}
        self._state: dict[str, Tensor] = {}
        """The task's tensors that the graph reads and writes."""
        self._written: FlatDict = {}
        self._after: FlatDict = {}
        self._replay: Callable[[], None] | None = None
        self._results: FlatDict = {}
        """Copies of the entries after the last step. The inputs of the next replay have the same numbers."""
        self._steps_left: int | None = None

    def begin(self, num_envs: int) -> None:
        """Prepare a rollout."""
        self.policy.begin(num_envs)
        self._replay, self._results = None, {}
        self._steps_left = self._task.steps_left()
        if self._policy_alone is not None:
            self._policy_alone.begin(num_envs)

    def check(self, steps: FlatDict) -> None:
        """Check a rollout as the policy does."""
        self.policy.check(steps)

    def __call__(self, carried: FlatDict, *, may_begin: bool = True) -> FlatDict:
        """Take a step of both, and return the entries that the policy writes; a graph ignores `may_begin`."""
        if self._replay is None and self._policy_alone is None:
            self._replay = self._captured(carried)
        if self._policy_alone is not None:
            return self._policy_alone(carried, may_begin=may_begin)
        self._load(carried)
        assert self._replay is not None
        self._replay()
        # Copies, since the next replay overwrites the results. Several entries may be one tensor.
        results = {id(value): value for value in (*self._written.values(), *self._after.values())}
        copies = {number: value if value is self.env.never else value.clone() for number, value in results.items()}
        self._results = {key: copies[id(value)] for key, value in self._after.items()}
        return {key: copies[id(value)] for key, value in self._written.items()}

    def step(self, carried: FlatDict, written: FlatDict) -> Step:
        """Return what `FusedEnv.step` does, for the step that the call has taken."""
        if self._policy_alone is not None:
            return self.env.step(carried, written)
        after = dict(self._results)
        if self._steps_left is None:
            is_any_over = bool(after[keys.DONE].any())
        else:
            self._steps_left -= 1
            is_any_over = self._steps_left == 0
        if not is_any_over:
            return after, self.env.following(after), None
        begun = self.env.restart(after)
        if self._steps_left is not None:
            self._steps_left = self._task.max_episode_steps
        return begun

    def _captured(self, carried: FlatDict) -> Callable[[], None] | None:
        """Return the replay of a graph; None if there can be none."""
        before = self._task.tensors()
        self._inputs = {key: value.clone() for key, value in carried.items()}
        self._state = {name: value.clone() for name, value in before.items()}

        def load() -> None:
            self._task.set_tensors(before)
            self._load(carried)

        try:
            return self._capture(self._run, load)
        except RuntimeError as error:
            LOGGER.warning("cudagraph: the step of the environment cannot be captured, so it runs without: %s", error)
            self._policy_alone = GraphedPolicy(self.policy, self._capture)
            return None
        finally:
            self._task.set_tensors(before)

    def _load(self, carried: FlatDict) -> None:
        """Copy what the graph reads and has not written itself: after a reset, and at the first step."""
        for key, value in self._inputs.items():
            if key in carried and carried[key] is not self._results.get(key):
                value.copy_(carried[key])
        present = self._task.tensors()
        if any(present[name] is not value for name, value in self._state.items()):
            for name, value in self._state.items():
                value.copy_(present[name])
            self._task.set_tensors(self._state)

    def _run(self) -> FlatDict:
        self._task.set_tensors(self._state)
        written = self.policy(self._inputs)
        after = self.env.advance(self._inputs, written)
        # Below, the inputs are overwritten, so results that share their memory are copied first.
        read = {_memory(value) for value in (*self._inputs.values(), *self._state.values())}

        def apart(value: Tensor) -> Tensor:
            return value.clone() if _memory(value) in read else value

        self._written = {key: apart(value) for key, value in written.items()}
        self._after = {key: apart(value) for key, value in after.items()}
        state = {name: apart(value) for name, value in self._task.tensors().items()}
        for key, value in self.env.following(self._after).items():
            if key in self._inputs:
                self._inputs[key].copy_(value)
        for name, value in self._state.items():
            if state[name].dtype is not value.dtype:  # a copy would round
                raise RuntimeError(f"'{name}' of the environment changes from {value.dtype} to {state[name].dtype}")
            value.copy_(state[name])
        self._task.set_tensors(self._state)
        return self._written


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


GraphedSteps = tuple[PolicyStep | GraphedPolicy | GraphedTask, EnvStep | GraphedTask]
"""The steps of a policy and of an environment, as a collector calls them."""


def with_graph(
    policy: PolicyStep, env: EnvStep, devices: Iterable[torch.device], cudagraph: bool | None
) -> GraphedSteps:
    """Return the steps of a policy and of an environment, as one CUDA graph, or only the policy's as a graph.

    Args:
        policy: the policy's step.
        env: the environment's step.
        devices: the devices of policy, environment and storage.
        cudagraph: True: an error if there can be no graph. None: no graph then. False: never a graph.

    Raises:
        ValueError: if `cudagraph` is true, but the policy is not fused, or is not on a CUDA device.
    """
    is_fused, found = isinstance(policy, FusedPolicy), sorted(set(map(str, devices)))
    if cudagraph is not False and is_fused and all(name.startswith("cuda") for name in found):
        if isinstance(env, FusedEnv) and env.task is not None:
            both = GraphedTask(policy, env, env.task)
            return both, both
        return GraphedPolicy(policy), env
    if cudagraph:
        here = f"here are {', '.join(found)}" if is_fused else "the policy here is called as a whole"
        raise ValueError(
            "cudagraph needs a policy that can be fused, and all of it, the environment too, on one CUDA device; "
            f"{here}."
        )
    return policy, env


def captured_on_cuda(run: Run, load: Callable[[], None]) -> Callable[[], None]:
    """Capture a computation on the present CUDA device.

    Args:
        run: the computation.
        load: loads the inputs again, which a run may have overwritten.

    Source: PyTorch's "CUDA semantics", section "CUDA Graphs": warm up on another stream, then capture.
    """
    # The warm-up draws random numbers. Its generator is restored, so that graph and no graph draw the same ones.
    random_state = torch.cuda.get_rng_state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                load()
                run()
    finally:
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.set_rng_state(random_state)
    graph = torch.cuda.CUDAGraph()
    # If a capture fails, torch leaves its stream current; the outer `stream` restores ours.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        run()
    return graph.replay
