"""Workers on the nodes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchrl.envs import EnvBase

from cyborg_torchrl.collectors.rng import random_state, set_random_state
from cyborg_torchrl.collectors.rollout_collector import RolloutCollector
from cyborg_torchrl.collectors.runtime import prepare_cpu
from cyborg_torchrl.data import Rollout
from cyborg_torchrl.modules.nan_check import NonFiniteError


class RayWorker:
    """A Ray actor with some environments and a copy of the policy."""

    def __init__(
        self,
        index: int,
        make_env: Callable[[int], EnvBase],
        seed: int,
        modules: nn.ModuleList,
        options: Mapping[str, Any],
        num_threads: int,
    ) -> None:
        # A worker is a process of the cluster, so it sets threads and denormals for itself.
        prepare_cpu(num_threads)
        env = make_env(seed)
        self.first_environment = index * env.batch_size.numel()
        torch.manual_seed(seed)
        self.modules = modules.to(env.device)
        self.collector = RolloutCollector(env, modules[0], value_operator=modules[1], **options)
        self.set_seed(seed)

    def rollout(self, parameters: Mapping[str, Tensor]) -> Rollout | dict[str, Any]:
        """Collect a rollout with these parameters; return the arguments of a `NonFiniteError` if there is one."""
        # In place: the collector holds this policy, and perhaps a compiled step over its tensors.
        with torch.no_grad():
            for name, value in named_tensors(self.modules).items():
                value.copy_(parameters[name])
        try:
            rollout = self.collector.rollout()
        except NonFiniteError as error:
            found = {"key": error.key, "value": error.value, "step": error.step, "record": error.record}
            if error.environment is not None:
                # Its number among the environments of all workers.
                found["environment"] = self.first_environment + error.environment
            return found
        return Rollout(rollout.steps.cpu().contiguous(), rollout.stored_states.cpu().contiguous(), rollout.state_steps)

    def set_seed(self, seed: int) -> None:
        """Seed actions and episodes."""
        torch.manual_seed(seed)
        self.collector.set_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of environments and random generators, with all tensors on the CPU."""
        state = {"collector": self.collector.state_dict(), "rng": random_state()}
        return tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, state)

    def load_state_dict(self, state: Mapping[str, Any]) -> int:
        """Restore a state, and return how many environments begin new episodes instead."""
        lost = self.collector.load_state_dict(state["collector"])
        set_random_state(state["rng"])
        return lost

    def close(self) -> None:
        """Close the environments."""
        self.collector.shutdown()


def named_tensors(modules: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name; shared ones occur once."""
    named = [*modules.named_parameters(), *modules.named_buffers()]
    return {name: value.detach() for name, value in named}
