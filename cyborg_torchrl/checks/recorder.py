"""The framework-free checks: of a policy given as plain functions, and of what a training loop stored."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from cyborg_torchrl import keys
from cyborg_torchrl.checks.functions import IS_FIRST, OUTPUTS, SCALE, FunctionPolicy, MemoryPolicy
from cyborg_torchrl.checks.nested import Tree, as_tensor, leaves_of, map_leaves
from cyborg_torchrl.checks.probe import TINY
from cyborg_torchrl.checks.report import Report
from cyborg_torchrl.checks.rollout import MIN_STEPS, Bootstraps, Rollout
from cyborg_torchrl.checks.suite import Options, Progress, run_checks, silent

EPISODE_ENDS = 0.05
"""Probability that an episode begins at a step, if the caller names no first steps."""


class Recorder:
    """Takes what a library stored for its update, step by step, and checks it against the library's policy.

    >>> recorder = Recorder(policy)  # doctest: +SKIP
    >>> for t in range(128):  # doctest: +SKIP
    ...     recorder.add(observation, is_first, state=state, action=action, log_prob=log_prob)
    >>> recorder.bootstrap(last_observation, last_value)  # doctest: +SKIP
    >>> report = recorder.check()  # doctest: +SKIP

    Args:
        policy: the functions of the policy, with the parameters that it acted with.
    """

    def __init__(self, policy: MemoryPolicy) -> None:
        self.policy = policy
        self._tested: FunctionPolicy | None = None
        self._steps: list[TensorDictBase] = []
        self._bootstraps: list[tuple[TensorDictBase, TensorDictBase, Tensor]] = []

    def add(
        self,
        observation: Tree,
        is_first: Any,
        *,
        state: Tree = None,
        outputs: Tree = None,
        action: Any = None,
        log_prob: Any = None,
    ) -> None:
        """Add a step of N environments.

        Args:
            observation: [N, ...], nested in any way.
            is_first: true where the step begins an episode, [N].
            state: the stored state before the step, in the policy's form. None where the library stores none: the
                state is then computed by the policy's step from the last one, and is the initial state at first.
            outputs: what the policy returned when it acted.
            action: the action, [N, ...], if the policy has a `log_prob` function.
            log_prob: the stored log-prob of the action, [N].

        Raises:
            ValueError: if there is nothing to compare with: neither outputs nor an action with its log-prob.
        """
        if outputs is None and (action is None or log_prob is None or not hasattr(self.policy, "log_prob")):
            raise ValueError(
                "a step needs something to compare with: outputs=, or action= and log_prob= with a policy that has a "
                "log_prob(outputs, actions) function."
            )
        tested = self._tested = self._tested or FunctionPolicy(self.policy, observation)
        flags = as_tensor(is_first).bool().reshape(-1, 1)
        step = TensorDict({**tested.inputs_from(observation), IS_FIRST: flags}, [len(flags)])
        step.update(self._next_states(len(flags)) if state is None else tested.states_from(state))
        if outputs is not None:
            step.set(OUTPUTS, tested.flat(outputs, step.shape))
        if action is not None and log_prob is not None and hasattr(self.policy, "log_prob"):
            step.set(keys.ACTION, as_tensor(action))
            step.set(keys.ACTION_LOG_PROB, as_tensor(log_prob).reshape(step.shape))
        self._steps.append(step.detach().clone())

    def bootstrap(self, observation: Tree, value: Any, rows: Any = None) -> None:
        """Add the value that the update uses for the observation after the last step.

        Args:
            observation: the next observation, [N, ...]; at a truncation the last one of the episode.
            value: the value used, [N].
            rows: true where there is such a value, [N]; None: everywhere.

        Raises:
            ValueError: if no step was added before.
        """
        if self._tested is None:
            raise ValueError("add a step before its bootstrapped value.")
        last = self._steps[-1]
        mask = torch.ones(last.shape, dtype=torch.bool) if rows is None else as_tensor(rows).bool().reshape(last.shape)
        following = TensorDict(self._tested.inputs_from(observation), last.shape).detach().clone()
        used = as_tensor(value).detach().reshape(last.shape)
        self._bootstraps.append((last[mask], following[mask], used[mask]))

    def check(
        self,
        *,
        chunk_lengths: tuple[int, ...] = (1, 5, 32),
        seed: int = 0,
        tolerance: float | None = None,
        drift_updates: int = 8,
        drift_learning_rate: float = 1e-3,
        on_progress: Progress = silent,
    ) -> Report:
        """Replay the steps and run all checks. The options are those of `check_recurrent`.

        Raises:
            ValueError: if there are fewer than four steps, or an option is out of range.
        """
        options = Options(chunk_lengths, seed, tolerance, drift_updates, drift_learning_rate)
        return run_checks(*self._rollout(), options, on_progress)

    def _rollout(self) -> tuple[FunctionPolicy, Rollout]:
        if self._tested is None or len(self._steps) < MIN_STEPS:
            raise ValueError(f"record at least {MIN_STEPS} consecutive steps; got {len(self._steps)}.")
        steps = torch.stack(self._steps, 1).contiguous()
        if OUTPUTS in steps.keys():
            scale = steps.get(OUTPUTS).abs().max().clamp_min(TINY)
            steps.set(SCALE, scale.expand(*steps.shape, 1).clone())
        fresh = {key: value[0] for key, value in self._tested.initial_states(1).items()}
        parts = list(zip(*self._bootstraps, strict=True))
        bootstraps = Bootstraps(*(torch.cat(part) for part in parts)) if parts else None
        return self._tested, Rollout(steps, fresh, False, bootstraps)

    @torch.no_grad()
    def _next_states(self, batch: int) -> dict[str, Tensor]:
        assert self._tested is not None
        return self._tested.act(self._steps[-1]).states if self._steps else self._tested.initial_states(batch)


def check_memory(
    policy: MemoryPolicy, observations: Tree, is_first: Any = None, *, seed: int = 0, **options: Any
) -> Report:
    """Check a recurrent policy of any library, given as plain functions.

    The policy acts on the observations, step by step. Its outputs and states are then compared with its sequence
    function, as in `check_recurrent`. Parameters are changed in place during some checks, and restored.

    Args:
        policy: an object with the functions of `MemoryPolicy`.
        observations: [N, T, ...] in numpy or torch, nested in any way. Take them from the policy's environment, or
            draw them.
        is_first: true where a step begins an episode, [N, T]; None: at the first step and at 5 % of the others.
        seed: seed of the first steps and of all perturbations.
        **options: `chunk_lengths`, `tolerance`, `drift_updates`, `drift_learning_rate` and `on_progress`, as in
            `check_recurrent`.

    Raises:
        ValueError: if the policy has no state, the shapes of its outputs are wrong, or T < 4.

    Examples: see `docs/checker.md`.
    """
    batch = tuple(leaves_of(observations)[0].shape[:2])
    if is_first is None:
        flags = torch.rand(batch, generator=torch.Generator().manual_seed(seed)) < EPISODE_ENDS
        flags[:, 0] = True
    else:
        flags = as_tensor(is_first).bool().reshape(batch)
    recorder = Recorder(policy)
    state = policy.initial_state(batch[0])
    is_numpy = FunctionPolicy(policy, observations).is_numpy
    with torch.no_grad():
        for t in range(batch[1]):
            now = map_leaves(lambda leaf, t=t: leaf[:, t], observations)
            outputs, following = policy.step(now, state, flags[:, t].numpy() if is_numpy else flags[:, t])
            recorder.add(now, flags[:, t], state=state, outputs=outputs)
            state = following
    return recorder.check(seed=seed, **options)
