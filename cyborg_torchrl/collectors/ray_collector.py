"""A collector on a Ray cluster."""

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
from cyborg_torchrl.modules.nan_check import NonFiniteError

LOGGER = logging.getLogger(__name__)
WAIT_MESSAGE_TIMEOUT = 60.0
"""Seconds without a result before a warning names the workers that are waited for."""
CLOSE_TIMEOUT = 3.0
"""Seconds that environments have to close."""
MAX_DEATHS = 5
"""How often a worker may die before it has finished a rollout."""


class WorkerError(RuntimeError):
    """A worker that cannot continue; the message is one line with the reason."""


class RayRolloutCollector:
    """A `RolloutCollector` over workers on a Ray cluster; each worker has its environments and memory states.

    All workers play each rollout with the latest parameters. The learner gets one rollout [N, T] with the environments
    of all workers. The result of a worker depends only on its seed, not on timing.

    A worker that dies is replaced. Its unfinished batch is lost. The new worker plays another batch, in environments
    with another seed, from the initial memory states.

    Args:
        makers: for each worker a function from a seed to its environments, all of the same number. Functions of the
            script that runs are sent by value, others by name. Their imports must exist on every node.
        policy: chooses the actions; a copy goes to the workers, onto the device of their environments.
        frames_per_batch: steps of a rollout, over all workers.
        total_frames: steps in total; a multiple of `frames_per_batch`.
        value_operator: as for `RolloutCollector`; it goes to the workers with the policy.
        cluster: the cluster of the workers; it is shut down with the collector.
        seed: worker i begins with seed + i; each replacement has another seed.
        device: device of the rollouts.
        **options: those of `RolloutCollector`: state_steps, exclude_keys, is_fused.

    Raises:
        ValueError: if `frames_per_batch` is not a multiple of the number of workers, or `total_frames` of
            `frames_per_batch`.
        NonFiniteError: while collecting, as `RolloutCollector` does.
        WorkerError: while collecting, if an environment or the policy fails, or a worker dies repeatedly.
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
        self._makers, self._cluster, self._ray, self._seed = list(makers), cluster, cluster.ray, seed
        self._modules = nn.ModuleList([policy, value_operator])
        self._options = {"frames_per_batch": batch, "total_frames": batch, **options}
        self._starts = [0] * len(makers)
        self._worker = cluster.ray.remote(RayWorker)
        # The networks are sent once, and later only their parameters, which are sent once for all workers.
        self._copy = cluster.ray.put(copy.deepcopy(self._modules).cpu())
        self._parameters: Any = None
        self.update_policy_weights_()
        self._workers = [self._started(index) for index in range(len(makers))]

    def __iter__(self) -> Iterator[Rollout]:
        """Yield rollouts until `total_frames` steps have been taken."""
        while self.frames < self.total_frames:
            rollout = self.rollout()
            self.frames += self.frames_per_batch
            yield rollout
            del rollout  # so that two rollouts never exist at once

    def rollout(self) -> Rollout:
        """Collect one rollout of all workers; episodes continue from the last one."""
        # Results are placed by worker, not by time of arrival, so a rollout does not depend on timing.
        parts: list[Rollout | None] = [None] * len(self._workers)
        deaths = [0] * len(self._workers)
        running = {self._ask(index): index for index in range(len(self._workers))}
        while running:
            done, _ = self._ray.wait(list(running), timeout=WAIT_MESSAGE_TIMEOUT)
            if not done:
                LOGGER.warning("still waiting for workers %s.", sorted(running.values()))
                continue
            index = running.pop(done[0])
            try:
                part = self._ray.get(done[0])
            except self._cluster.deaths as error:
                # Only this worker plays again; the results of the others stay.
                deaths[index] += 1
                self._replace(index, deaths[index], error)
                running[self._ask(index)] = index
            except self._cluster.faults as error:
                raise WorkerError(f"worker {index} failed: {_last_line(error)}") from error
            else:
                # A worker that finds NaN returns the arguments of the error instead of a rollout.
                if not isinstance(part, Rollout):
                    raise NonFiniteError(**part)
                parts[index] = part
        return _joined([part for part in parts if part is not None], self.device)

    def update_policy_weights_(self, policy: TensorDictModuleBase | None = None) -> None:
        """Send the policy's present parameters to the workers, for the next rollout.

        Args:
            policy: a policy whose parameter values are copied first; None: no copy.
        """
        if policy is not None and policy is not self._modules[0]:
            self._modules[0].load_state_dict(policy.state_dict())
        parameters = {name: value.cpu() for name, value in named_tensors(self._modules).items()}
        self._parameters = self._ray.put(parameters)

    def set_seed(self, seed: int) -> int:
        """Seed the workers, each with another seed, and return a seed for the next collector."""
        self._seed = seed
        for index, worker in enumerate(self._workers):
            worker.set_seed.remote(self._seed_of(index))
        return seed + len(self._workers)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state of the workers between two rollouts; None if one has no state or is dead."""
        try:
            states = self._ray.get([worker.state_dict.remote() for worker in self._workers])
        except self._cluster.deaths:  # the next rollout replaces it
            return None
        if any(state["collector"] is None for state in states):
            return None
        return {"workers": states, "starts": list(self._starts), "frames": self.frames}

    def load_state_dict(self, state: Mapping[str, Any]) -> int:
        """Restore a state of `state_dict`, and return how many environments begin new episodes instead.

        Raises:
            ValueError: if the state belongs to another collector.
        """
        if len(state["workers"]) != len(self._workers):
            saved = len(state["workers"])
            raise ValueError(f"the state is for {saved} workers; this collector has {len(self._workers)}.")
        pairs = zip(self._workers, state["workers"], strict=True)
        try:
            lost = self._ray.get([worker.load_state_dict.remote(own) for worker, own in pairs])
        except (*self._cluster.deaths, *self._cluster.faults) as error:
            raise ValueError(f"a worker could not be restored: {_last_line(error)}") from error
        self._starts, self.frames = list(state["starts"]), state["frames"]
        return sum(lost)

    def shutdown(self) -> None:
        """Close the environments and end the workers, and the cluster if it was started for them."""
        workers, self._workers = self._workers, []
        if workers:
            closing = [worker.close.remote() for worker in workers]
            self._ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT)
        for worker in workers:
            self._ray.kill(worker)
        self._cluster.shutdown()

    def _started(self, index: int) -> Any:
        """Start a worker without waiting for it."""
        worker = self._worker.options(**self._cluster.share_of_worker(is_replacement=self._starts[index] > 0))
        seed, num_threads = self._seed_of(index), self._cluster.num_threads
        return worker.remote(index, self._makers[index], seed, self._copy, self._options, num_threads)

    def _seed_of(self, index: int) -> int:
        """Return the seed of a worker; replacements continue the sequence of seeds."""
        return self._seed + index + len(self._makers) * self._starts[index]

    def _ask(self, index: int) -> Any:
        return self._workers[index].rollout.remote(self._parameters)

    def _replace(self, index: int, deaths: int, error: BaseException) -> None:
        if getattr(error, "actor_init_failed", False):
            raise WorkerError(f"worker {index} failed as it began: {_last_line(error)}") from error
        if deaths > MAX_DEATHS:
            raise WorkerError(
                f"worker {index} died {deaths} times before it had finished a rollout: {_last_line(error)} Is there "
                "memory enough where it runs?"
            ) from error
        self.deaths += 1
        LOGGER.warning("worker %d died; its unfinished batch is lost, and a new worker replaces it.", index)
        self._ray.kill(self._workers[index])
        # The replacement has another seed; otherwise it would repeat the episodes of the dead worker.
        self._starts[index] += 1
        self._workers[index] = self._started(index)


def _joined(parts: Sequence[Rollout], device: torch.device) -> Rollout:
    steps, stored_states = torch.cat([part.steps for part in parts]), torch.cat([part.stored_states for part in parts])
    return Rollout(steps.to(device), stored_states.to(device), parts[0].state_steps)


def _last_line(error: BaseException) -> str:
    """Return the last line of an error from another process, which is its original message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
