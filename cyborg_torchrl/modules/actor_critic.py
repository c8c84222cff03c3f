"""The agent: encoder, memory, policy head and value head over one pass of the backbone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import Tensor, distributions, nn
from torchrl.data import TensorSpec
from torchrl.envs.utils import ExplorationType
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl import keys
from cyborg_torchrl.cores import State
from cyborg_torchrl.modules.action_heads import build_action_head
from cyborg_torchrl.modules.backbone import Backbone
from cyborg_torchrl.modules.fusion import PastPresentFusion
from cyborg_torchrl.modules.nan_check import check_finite


class ActionEvaluation(NamedTuple):
    """Result of `PPOAgent.evaluate_actions`."""

    log_prob: Tensor
    """[B, T]."""
    entropy: Tensor
    """[B, T]."""
    value: Tensor
    """[B, T]."""
    state: State
    """Memory state after the last step, {name: [B, *shape]}."""


class PPOAgent(TensorDictModuleBase):
    """Actor and critic over one memory.

    As a policy for collectors, it reads a tensordict and writes the action, its log-prob, the value and the next memory
    state. TorchRL's losses call `get_dist`. `evaluate_actions` does the same over plain tensors.

    Args:
        encoder: reads the observations, writes "features".
        backbone: the memory.
        action_spec: action spec of the environment; decides the distribution.
        batch_dims: leading batch dimensions of the spec's shape.
        policy_scale: factor on the policy head's initial weights.
        value_scale: factor on the value head's initial weights.
        is_gated: let the present gate the past in the fusion.
        env_statistics: running statistics of the environment's transforms. They are saved and loaded with the agent,
            and not used here.
    """

    def __init__(
        self,
        encoder: TensorDictModule,
        backbone: Backbone,
        action_spec: TensorSpec,
        *,
        batch_dims: int = 0,
        policy_scale: float = 0.01,
        value_scale: float = 0.1,
        is_gated: bool = False,
        env_statistics: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.env_statistics = env_statistics
        core = backbone.core
        width = core.out_features
        head = build_action_head(action_spec, width, scale=policy_scale, batch_dims=batch_dims)
        self.encoder, self.backbone = encoder, backbone
        self.fusion = TensorDictModule(
            PastPresentFusion(core.in_features, width, is_gated=is_gated),
            in_keys=[keys.FEATURES, keys.MEMORY_FEATURES],
            out_keys=[keys.JOINT_FEATURES],
        )
        self.policy_head = TensorDictModule(head.network, in_keys=[keys.JOINT_FEATURES], out_keys=head.param_keys)
        value_network = nn.Linear(width, 1)
        with torch.no_grad():
            value_network.weight *= value_scale
            value_network.bias.zero_()
        self.value_head = TensorDictModule(value_network, in_keys=[keys.JOINT_FEATURES], out_keys=[keys.VALUE])
        self.sampler = ProbabilisticTensorDictModule(
            in_keys=head.param_keys,
            out_keys=[keys.ACTION],
            distribution_class=head.distribution_class,
            distribution_kwargs=head.distribution_kwargs,
            default_interaction_type=ExplorationType.RANDOM,
            return_log_prob=True,
            log_prob_key=keys.ACTION_LOG_PROB,
        )
        self.in_keys = list(dict.fromkeys([*encoder.in_keys, *backbone.in_keys[1:]]))
        self.out_keys = [
            *backbone.out_keys[1:],
            *head.param_keys,
            keys.VALUE,
            keys.ACTION,
            keys.ACTION_LOG_PROB,
        ]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Act: one step for each environment. The features stay out of the tensordict.

        Raises:
            NonFiniteError: if an input or a distribution parameter is not finite.
        """
        work = tensordict.select(*self.in_keys, strict=False)
        for module in (self.encoder, self.backbone, self.fusion, self.policy_head, self.value_head):
            work = module(work)
        try:
            work = self.sampler(work)
        except (ValueError, RuntimeError):  # torch's message about NaN names neither entry nor environment
            rows = work.reshape(-1).unsqueeze(1)
            check_finite(rows, [*self.encoder.in_keys, *self.policy_head.out_keys], is_rollout=False)
            raise
        return tensordict.update(work.select(*self.out_keys, strict=False))

    def get_dist(self, tensordict: TensorDictBase) -> distributions.Distribution:
        """Return the action distribution, and write the joint features, which the value head reads.

        In recurrent mode it runs over sequences [*B, T], from the state of each sequence's first step.
        """
        return self._pass(tensordict)[0]

    def evaluate_actions(
        self,
        obs: Tensor | TensorDictBase,
        actions: Tensor,
        state: State | TensorDictBase | None = None,
        is_init: Tensor | None = None,
    ) -> ActionEvaluation:
        """Evaluate actions taken along sequences.

        Args:
            obs: observations [B, T, ...]; a tensordict [B, T] if the encoder reads several keys.
            actions: [B, T] or [B, T, A].
            state: memory state before the first step, {name: [B, *shape]}; None: the initial state.
            is_init: true where episodes begin, [B, T] or [B, T, 1]; None: no episode begins within the sequences.

        Returns:
            Log-probs, entropies and values, [B, T], and the memory state after the last step.

        Raises:
            ValueError: if the leading dimensions [B, T] of the arguments disagree.
        """
        batch = torch.Size(obs.shape[:2])
        flags = torch.zeros(batch, dtype=torch.bool, device=actions.device) if is_init is None else is_init
        flags = flags.reshape(*flags.shape[:2], 1)
        if actions.shape[:2] != batch or flags.shape[:2] != batch:
            raise ValueError(
                f"obs, actions and is_init must begin with the same [B, T]; got {tuple(batch)}, "
                f"{tuple(actions.shape[:2])} and {tuple(flags.shape[:2])}."
            )
        if isinstance(obs, TensorDictBase):
            tensordict = obs.copy()
        else:
            if len(self.encoder.in_keys) != 1:
                raise ValueError(f"the encoder reads {self.encoder.in_keys}: pass obs as a tensordict with these keys.")
            tensordict = TensorDict({self.encoder.in_keys[0]: obs}, batch)
        if state is None:
            flags = torch.cat([torch.ones_like(flags[:, :1]), flags[:, 1:]], 1)
            state = self.backbone.core.initial_state(batch[0])
        tensordict.set(self.backbone.is_init_key, flags)
        for name, key in self.backbone.state_keys.items():
            value = state[name]
            expected = (batch[0], *self.backbone.core.state_shapes[name])
            if value.shape != expected:
                raise ValueError(f"state '{name}' must have shape {expected}; got {tuple(value.shape)}.")
            tensordict.set(key, value.unsqueeze(1).expand(batch[0], batch[1], *value.shape[1:]))
        with set_recurrent_mode(True):
            dist, last = self._pass(tensordict)
        value = self.value_head(tensordict).get(keys.VALUE).squeeze(-1)
        return ActionEvaluation(dist.log_prob(actions), dist.entropy(), value, last)

    def get_policy_operator(self) -> ProbabilisticTensorDictSequential:
        """Return the actor alone, in the form that TorchRL's losses and collectors take; parameters are shared."""
        return ProbabilisticTensorDictSequential(
            self.encoder, self.backbone, self.fusion, self.policy_head, self.sampler
        )

    def get_value_operator(self) -> TensorDictSequential:
        """Return the critic alone, from observations to values; parameters are shared."""
        return TensorDictSequential(self.encoder, self.backbone, self.fusion, self.value_head)

    def get_value_head(self) -> TensorDictModule:
        """Return the critic that reads the actor's features, so that one backbone pass serves both."""
        return self.value_head

    def _pass(self, tensordict: TensorDictBase) -> tuple[distributions.Distribution, State]:
        self.encoder(tensordict)
        last = self.backbone.run(tensordict)
        self.policy_head(self.fusion(tensordict))
        return self.sampler.get_dist(tensordict), last
