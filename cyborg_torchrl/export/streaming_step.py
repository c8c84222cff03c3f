"""One step of an agent on plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torch.nn import functional as F
from torchrl.envs import EnvBase
from torchrl.modules import TanhNormal

from cyborg_torchrl.cores import State, restart
from cyborg_torchrl.envs.transforms.normalization import NormalizeObservation, transforms_of
from cyborg_torchrl.modules import MultiDiscrete, PPOAgent
from cyborg_torchrl.modules.encoders.autocast import Autocast

FlatDict = dict[str, Tensor]


class StreamingStep(nn.Module):
    """One step of an agent: the likeliest action, from unnormalised observations.

    The state is a plain dictionary. Where an episode begins, it is replaced by the agent's initial state, so zeros are
    right for the first step. Parameters are shared with the agent.

    Args:
        agent: the agent.
        normalized: normalisers by names of observations (see `normalizers_of`).
    """

    def __init__(self, agent: PPOAgent, normalized: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.encoded = [dotted(key) for key in agent.encoder.in_keys]
        self.masks = [dotted(key) for key in agent.policy_head.in_keys[1:]]
        self.observation_keys = {dotted(key): key for key in agent.observed_keys}
        self.parameter_names = list(agent.policy_head.out_keys)
        self.encoder, self.core = agent.encoder.module, agent.backbone.core
        self.fusion, self.policy_head = agent.fusion.module, agent.policy_head.module
        self.normalizers = nn.ModuleDict({_safe(name): module for name, module in (normalized or {}).items()})
        self.distribution = agent.sampler.distribution_class
        options = agent.sampler.distribution_kwargs or {}
        self.sizes: Sequence[int] = options.get("sizes", ())
        self.bounds: Tensor | None
        self.register_buffer("bounds", None)
        if issubclass(self.distribution, TanhNormal):
            self.bounds = torch.stack([options["low"], options["high"]])

    def forward(self, observation: FlatDict, state: State, is_init: Bool[Tensor, " B"]) -> dict[str, Any]:
        """Take one step.

        Args:
            observation: {name: [B, *shape]}, in the order of `observation_keys`. A mask of valid actions comes last.
            state: memory before the step, {name: [B, *shape]}, in the order of the core's `state_shapes`.
            is_init: true where an episode begins.

        Returns:
            "action" [B, ...]; the parameters of its distribution: "logits", or "loc" and "scale"; and "state".
        """
        seen = (self._normalized(name, observation[name]) for name in self.encoded)
        features = self.encoder(*seen)
        state = restart(state, self.core.initial_state(is_init.shape[0]), is_init)
        memory, state = self.core.step(features, state)
        parameters = self.policy_head(self.fusion(features, memory), *(observation[name] for name in self.masks))
        parameters = (parameters,) if isinstance(parameters, Tensor) else parameters
        named = dict(zip(self.parameter_names, parameters, strict=True))
        return {"action": self._likeliest(named), **named, "state": {n: state[n] for n in self.core.state_shapes}}

    def _normalized(self, name: str, seen: Tensor) -> Tensor:
        return self.normalizers[_safe(name)](seen) if _safe(name) in self.normalizers else seen

    def _likeliest(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the mode of the distribution: an index, indices, a one-hot vector of integers, or numbers."""
        if self.bounds is not None:
            low, high = self.bounds
            return low + (high - low) * (1.0 + torch.tanh(parameters["loc"])) / 2.0
        if "loc" in parameters:
            return parameters["loc"].clone()  # two outputs must not share memory
        logits = parameters["logits"]
        if self.distribution is MultiDiscrete:
            return torch.stack([part.argmax(-1) for part in logits.split(list(self.sizes), -1)], -1)
        best = logits.argmax(-1)
        return best if self.distribution is torch.distributions.Categorical else F.one_hot(best, logits.shape[-1])


def leave_autocast(agent: PPOAgent) -> bool:
    """Let an agent's encoder compute in float32. Return whether it used another precision."""
    if not isinstance(agent.encoder.module, Autocast):
        return False
    agent.encoder.module = agent.encoder.module.network
    return True


class Normalizer(nn.Module):
    """Normaliser of one observation with fixed statistics, equal to `NormalizeObservation`.

    Args:
        mean: [*shape], in double precision.
        std: [*shape], in double precision.
        limit: largest absolute value of the result.
    """

    def __init__(self, mean: Tensor, std: Tensor, limit: float) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("std", std.detach().clone())
        self.limit = limit

    def forward(self, seen: Tensor) -> Tensor:
        """Normalise observations [B, *shape]."""
        return ((seen - self.mean) / self.std).clamp(-self.limit, self.limit).to(seen.dtype)


def normalizers_of(agent: PPOAgent, env: EnvBase) -> dict[str, Normalizer]:
    """Return the normalisers of an agent's observations by name; {} if they are not normalised.

    Args:
        agent: the agent with the statistics.
        env: the training environment, which gives the normalised observations and the number of stacked frames.
    """
    batch_dims = len(env.batch_size)
    found: dict[str, Normalizer] = {}
    for transform in transforms_of(env):
        if isinstance(transform, NormalizeObservation):
            for key, moments in zip(transform.in_keys, agent.env_statistics["observation"], strict=True):
                shape = env.observation_spec[key].shape[batch_dims:]  # all frames share the statistics of one
                frames = [size // own for size, own in zip(shape, moments.mean.shape, strict=True)]
                mean, std = (each.repeat(*frames) if frames else each for each in (moments.mean, moments.std))
                found[dotted(key)] = Normalizer(mean, std, transform.limit)
    return found


def dotted(key: NestedKey) -> str:
    """Return a key as one name, such as "camera.left"."""
    key = unravel_key(key)
    return key if isinstance(key, str) else ".".join(key)


def _safe(name: str) -> str:
    """Return a name without dots, as names of modules must be."""
    return name.replace(".", "/")
