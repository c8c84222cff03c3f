"""Collects rollouts on a Ray cluster."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.envs import EnvBase

from cyborg_torchrl.collectors.ray_cluster import RayCluster
from cyborg_torchrl.collectors.ray_worker import RayWorker, named_tensors
from cyborg_torchrl.collectors.rollout_collector import rollout_steps
from cyborg_torchrl.data import Rollout

LOGGER = logging.getLogger(__name__)
PATIENCE = 60.0
"""Seconds without news after which it is said what is waited for."""
CLOSING = 3.0
"""Seconds that environments have to close."""
MOST_DEATHS = 5
"""How often a worker may die before it has finished a rollout."""


class WorkerError(RuntimeError):
    """A worker that cannot go on; the message is one line that says why."""


class RayRolloutCollector:
    """As `RolloutCollector`, over workers on a Ray cluster, each with environments and memory states of its own.

    All workers play each rollout, with the parameters that were set last, and the learner gets it whole: [N, T], the
    environments of one worker below those of the other. What a worker plays depends on its seed alone, not on timing.

    A worker that dies, with its node or alone, is replaced: its unfinished batch is lost, and another one is played by
    a new worker in environments with another seed, from the initial memory states.

    Args:
        makers: for each worker a function from a seed to its environments; as many everywhere. They travel by value
            if they are defined in the script that is run, by name otherwise: what they import has to be there on every
            node.
        policy: acts; a copy of it on the CPU goes to the workers, and to their environments' device there.
        frames_per_batch: steps of a rollout, all workers together.
        total_frames: steps in all; whole rollouts.
        value_operator: as for `RolloutCollector`, in which it goes to the workers with the policy.
        cluster: where the workers live; it is shut down with the collector.
        seed: worker i begins with seed + i; each replacement has a seed of its own.
        device: where rollouts go.
        **options: those of `RolloutCollector`: state_steps, exclude_keys, is_fused.

    Raises:
        ValueError: if frames_per_batch is not a multiple of the number of workers, or total_frames of it.
        NonFiniteError: while collecting, as `RolloutCollector` does.
        WorkerError: while collecting, if an environment or the policy fails, or a worker dies over and over.
    """

    def __init__(
        self,
        makers: Sequence[Callable[[int], EnvBase]],
        policy: TensorDictModuleBase,
        *,
        frames_per_batch: int,
        total_frames: int,
        value_operator: TensorDictModuleBase,
        cluster: RayCluster,
        seed: int = 0,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        batch = rollout_steps(frames_per_batch, total_frames, len(makers))
        self.frames_per_batch, self.total_frames, self.frames = frames_per_batch, total_frames, 0
        self.device, self.deaths = torch.device(device), 0
        self._makers, self._cluster, self._seed = list(makers), cluster, seed
        self._modules = nn.ModuleList([policy, value_operator])
        self._options = {"frames_per_batch": batch, "total_frames": batch, **options}
        self._starts = [0] * len(makers)
        self._worker = cluster.actor_class(RayWorker)
        self._copy = cluster.put(copy.deepcopy(self._modules).cpu())
        self._parameters: Any = None
        self.update_policy_weights_()
        self._workers = [self._started(index) for index in range(len(makers))]

    def __iter__(self) -> Iterator[Rollout]:
        """Yields rollouts until `total_frames` steps have been taken."""
        while self.frames < self.total_frames:
            rollout = self.rollout()
            self.frames += self.frames_per_batch
            yield rollout
            del rollout  # before there is another one

    def rollout(self) -> Rollout:
        """A rollout of all workers; episodes go on where the last one ended."""
        parts: list[Rollout | None] = [None] * len(self._workers)
        deaths = [0] * len(self._workers)
        running = {self._ask(index): index for index in range(len(self._workers))}
        while running:
            reference = self._cluster.first_done(list(running), PATIENCE)
            if reference is None:
                LOGGER.warning("still waiting for workers %s.", sorted(running.values()))
                continue
            index = running.pop(reference)
            try:
                part = self._cluster.get(reference)
                parts[index] = part if isinstance(part, Rollout) else part.refuse(index)
            except self._cluster.deaths as error:
                deaths[index] += 1
                self._replace(index, deaths[index], error)
                running[self._ask(index)] = index
            except self._cluster.faults as error:
                raise WorkerError(f"worker {index} failed: {_said(error)}") from error
        return _joined([part for part in parts if part is not None], self.device)

    def update_policy_weights_(self, policy: TensorDictModuleBase | None = None) -> None:
        """Lets the next rollout be played with the policy's present parameters.

        Args:
            policy: one with the same parameters, whose values are taken over first; None: as they are.
        """
        if policy is not None and policy is not self._modules[0]:
            self._modules[0].load_state_dict(policy.state_dict())
        self._parameters = self._cluster.put(
            {name: value.cpu() for name, value in named_tensors(self._modules).items()}
        )

    def set_seed(self, seed: int) -> int:
        """Seeds the workers, each by its own seed. Returns a seed for the next collector."""
        self._seed = seed
        for index, worker in enumerate(self._workers):
            worker.set_seed.remote(self._seed_of(index))
        return seed + len(self._workers)

    def state_dict(self) -> dict[str, Any] | None:
        """Where the workers stand between two rollouts; None if one of them cannot tell, or is gone."""
        try:
            states = self._cluster.get([worker.state_dict.remote() for worker in self._workers])
        except self._cluster.deaths:  # the next rollout replaces it
            return None
        if any(state["collector"] is None for state in states):
            return None
        return {"workers": states, "starts": list(self._starts), "frames": self.frames}

    def load_state_dict(self, state: Mapping[str, Any]) -> int:
        """Goes back to a state of `state_dict`. Returns how many environments begin new episodes instead.

        Raises:
            ValueError: if it is the state of another collector.
        """
        if len(state["workers"]) != len(self._workers):
            raise ValueError(f"the state is that of {len(state['workers'])} workers; here are {len(self._workers)}.")
        pairs = zip(self._workers, state["workers"], strict=True)
        try:
            lost = self._cluster.get([worker.load_state_dict.remote(own) for worker, own in pairs])
        except (*self._cluster.deaths, *self._cluster.faults) as error:
            raise ValueError(f"a worker could not go back there: {_said(error)}") from error
        self._starts, self.frames = list(state["starts"]), state["frames"]
        return sum(lost)

    def shutdown(self) -> None:
        """Closes the environments and ends the workers; the cluster too, if it was started for them."""
        workers, self._workers = self._workers, []
        if workers:
            self._cluster.wait_for_all([worker.close.remote() for worker in workers], CLOSING)
        for worker in workers:
            self._cluster.end(worker)
        self._cluster.shutdown()

    def _started(self, index: int) -> Any:
        """A new worker; it begins while we go on."""
        worker = self._worker.options(**self._cluster.share_of_worker(is_replacement=self._starts[index] > 0))
        return worker.remote(
            self._makers[index], self._seed_of(index), self._copy, self._options, self._cluster.num_threads
        )

    def _seed_of(self, index: int) -> int:
        """Workers that begin have seeds one after the other; those that replace them go on from there."""
        return self._seed + index + len(self._makers) * self._starts[index]

    def _ask(self, index: int) -> Any:
        return self._workers[index].rollout.remote(self._parameters)

    def _replace(self, index: int, deaths: int, error: BaseException) -> None:
        if getattr(error, "actor_init_failed", False):
            raise WorkerError(f"worker {index} failed as it began: {_said(error)}") from error
        if deaths > MOST_DEATHS:
            raise WorkerError(
                f"worker {index} died {deaths} times before it had finished a rollout: {_said(error)} Is there memory "
                "enough where it runs?"
            ) from error
        self.deaths += 1
        LOGGER.warning("worker %d died; its unfinished batch is lost, and another one takes its place.", index)
        self._cluster.end(self._workers[index])
        self._starts[index] += 1
        self._workers[index] = self._started(index)


def _joined(parts: Sequence[Rollout], device: torch.device) -> Rollout:
    steps, stored_states = torch.cat([part.steps for part in parts]), torch.cat([part.stored_states for part in parts])
    return Rollout(steps.to(device), stored_states.to(device), parts[0].at)


def _said(error: BaseException) -> str:
    """The last line of an error that came over the network, which is what was said where it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
