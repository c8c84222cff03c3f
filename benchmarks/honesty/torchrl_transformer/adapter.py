"""TorchRL's `TransformerModule`, from a nightly build: in acting, its cache of keys and values is inside the module.

Its update runs whole episodes. So the state of this adapter holds the cache, and the observations of the episode so
far, which `sequence` puts in front.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper, InitTracker, SerialEnv, TransformedEnv
from torchrl.modules import TransformerModule, set_recurrent_mode

from benchmarks.honesty.common import ACTIONS, FEATURES, NUM_ENVS, STEPS, WIDTH, NoiseEnv, draw
from cyborg_torchrl.checks import DiscreteActorCritic, Recorder, Report, check_memory

PACKAGE = "torchrl-nightly"
EPISODE = 64
"""Largest number of steps of an episode before a sequence."""
CHANGE = 1e-6
"""Relative change of the parameters between the two rollouts, in place of an update."""


def build() -> ProbabilisticTensorDictSequential:
    """Return an actor with a value head."""
    sizes = {"num_layers": 1, "num_heads": 2, "max_seq_len": 2 * EPISODE}
    return ProbabilisticTensorDictSequential(
        TransformerModule(FEATURES, WIDTH, **sizes, in_key="observation", out_key="memory"),
        TensorDictModule(nn.Linear(WIDTH, ACTIONS), ["memory"], ["logits"]),
        TensorDictModule(nn.Linear(WIDTH, 1), ["memory"], ["state_value"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
            log_prob_key="action_log_prob",
        ),
    )


class Functions(DiscreteActorCritic):
    """The functions of the actor: see `MemoryPolicy`."""

    model: ProbabilisticTensorDictSequential

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        """Return an empty cache and an empty episode."""
        cached, values = self.model[0].transformer.new_kv_cache(batch)
        count = torch.zeros(batch, dtype=torch.long)
        seen = torch.zeros(batch, EPISODE, FEATURES)
        return {"keys": cached, "values": values, "seen": seen, "count": count, "weights": count + self._weights()}

    def step(self, observation: Tensor, state: dict[str, Tensor], is_first: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """Act with the module's cache. The module itself clears it where episodes begin and when parameters change.

        It finds changes by the versions of tensors. The checks restore parameters, so the adapter compares values.
        """
        module, weights = self.model[0], self._weights()
        module._kv_cache = state["keys"].clone(), state["values"].clone()
        module._positions = state["count"]
        is_same = bool((state["weights"] == weights).all())
        module._weights_version = module._current_weights_version() if is_same else None
        with torch.no_grad():  # the cache has no gradients
            outputs = self._run(observation, is_first)
        seen = torch.where(is_first.view(-1, 1, 1), 0.0, state["seen"])
        seen[torch.arange(len(seen)), module._positions - 1] = observation
        cached, values = module._kv_cache
        count = module._positions
        state = {"keys": cached, "values": values, "seen": seen, "count": count, "weights": count * 0 + weights}
        return outputs, state

    def sequence(self, observations: Tensor, state: dict[str, Tensor], is_first: Tensor) -> tuple[Tensor, Tensor]:
        """Run whole episodes: padding, the steps of the present episode so far, and these steps."""
        count = torch.where(is_first[:, 0], 0, state["count"]).unsqueeze(1)
        place = torch.arange(EPISODE) - (EPISODE - count)  # in the episode; negative: padding
        before = state["seen"].take_along_dim(place.clamp(min=0).unsqueeze(-1), 1)
        flags = torch.cat([place == 0, is_first | ((count == 0) & (torch.arange(is_first.shape[1]) == 0))], 1)
        flags[:, 0] = True
        with set_recurrent_mode(True):
            logits, values = self._run(torch.cat([before, observations], 1), flags)
        return logits[:, EPISODE:], values[:, EPISODE:]

    def _weights(self) -> Tensor:
        """Return the bits of the sum of all parameters."""
        return sum(parameter.detach().double().sum() for parameter in self.parameters()).view(torch.long)

    def _run(self, observations: Tensor, flags: Tensor) -> tuple[Tensor, Tensor]:
        steps = TensorDict({"observation": observations, "is_init": flags.unsqueeze(-1)}, flags.shape)
        for module in list(self.model)[:3]:
            steps = module(steps)
        return steps["logits"], steps["state_value"].squeeze(-1)


def check(seed: int) -> tuple[Report, Report]:
    """Check the actor, and two batches of TorchRL's collector with a tiny change of parameters between them."""
    torch.manual_seed(seed)
    report = check_memory(Functions(build()), draw(seed), seed=seed)
    policy = Functions(build())
    makers = [
        lambda index=index: GymWrapper(NoiseEnv(100 * seed + index), categorical_action_encoding=True)
        for index in range(NUM_ENVS)
    ]
    size = NUM_ENVS * STEPS
    env = TransformedEnv(SerialEnv(NUM_ENVS, makers), InitTracker())
    collector = Collector(env, policy.model, frames_per_batch=size, total_frames=2 * size)
    batches = []
    for batch in collector:
        batches.append(batch.clone())
        if len(batches) == 1:
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(1 + CHANGE)
    collector.shutdown()
    recorder = Recorder(policy)
    for step in torch.cat(batches, 1).unbind(1):
        stored = {"action": step["action"], "log_prob": step["action_log_prob"]}
        recorder.add(step["observation"], step["is_init"], **stored)
    return report, recorder.check()
