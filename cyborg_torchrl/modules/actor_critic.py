"""The agent: encoder, memory, policy head and value head over one pass of the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, distributions, nn
from torchrl.data import TensorSpec
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from cyborg_torchrl import keys
from cyborg_torchrl.cores import State
from cyborg_torchrl.modules.action_heads import ActionHead, MaskedLogits, build_action_head
from cyborg_torchrl.modules.backbone import Backbone
from cyborg_torchrl.modules.fusion import PastPresentFusion
from cyborg_torchrl.modules.mlp import with_hidden_layers
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


class ActionStep(NamedTuple):
    """Result of `PPOAgent.act`."""

    action: Tensor
    """[B], or [B, A]."""
    value: Tensor
    """[B]."""
    state: State
    """Memory state after the step, {name: [B, *shape]}."""


class PPOAgent(TensorDictModuleBase):
    """Actor and critic over one memory, or over one memory each.

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
        critic: encoder and memory of the critic, which write "critic_features" and "critic_memory_features", with the
            state "critic_state". None: the critic shares encoder and memory of the actor.
        policy_hidden_sizes: widths of hidden layers in the policy head.
        value_hidden_sizes: widths of hidden layers in the value head.
        action_mask: entry that marks the valid actions, [*B, *shape] of booleans; None: all actions are valid.
        mask_shape: shape of one mask.
        noise_key: entry of standard normal numbers, [*B, A], from which continuous actions take their randomness while
            acting; None, or where the entry is missing: independent noise.
        env_statistics: running statistics of the environment's transforms. They are saved and loaded with the agent,
            and not used here.
        **head_options: options of continuous actions (see `build_action_head`).

    Raises:
        ValueError: if no head fits the actions, or continuous actions have a mask.
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
        critic: tuple[TensorDictModule, Backbone] | None = None,
        policy_hidden_sizes: Sequence[int] = (),
        value_hidden_sizes: Sequence[int] = (),
        action_mask: NestedKey | None = None,
        mask_shape: Sequence[int] = (),
        noise_key: NestedKey | None = None,
        env_statistics: nn.Module | None = None,
        **head_options: Any,
    ) -> None:
        super().__init__()
        self.env_statistics = env_statistics
        width = backbone.core.out_features
        head = build_action_head(
            action_spec,
            width,
            scale=policy_scale,
            batch_dims=batch_dims,
            hidden_sizes=policy_hidden_sizes,
            **head_options,
        )
        self.encoder, self.backbone = encoder, backbone
        self.fusion = _fusion(backbone, keys.JOINT_FEATURES, is_gated=is_gated)
        self.policy_head = _policy_head(head, action_mask, mask_shape)
        self.critic = nn.ModuleList()
        """Encoder, memory and fusion of a separate critic; empty if it shares those of the actor."""
        value_key = keys.JOINT_FEATURES
        if critic is not None:
            value_key, width = keys.CRITIC_JOINT_FEATURES, critic[1].core.out_features
            self.critic.extend([*critic, _fusion(critic[1], value_key, is_gated=is_gated)])
        last = nn.Linear(value_hidden_sizes[-1] if value_hidden_sizes else width, 1)
        with torch.no_grad():
            last.weight *= value_scale
            last.bias.zero_()
        value_network = with_hidden_layers(width, value_hidden_sizes, last)
        self.value_head = TensorDictModule(value_network, in_keys=[value_key], out_keys=[keys.VALUE])
        self.sampler = ProbabilisticTensorDictModule(
            in_keys={name: name for name in head.param_keys} | ({} if noise_key is None else {"noise": noise_key}),
            out_keys=[keys.ACTION],
            distribution_class=head.distribution_class,
            distribution_kwargs=head.distribution_kwargs,
            default_interaction_type=ExplorationType.RANDOM,
            return_log_prob=True,
            log_prob_key=keys.ACTION_LOG_PROB,
        )
        observed = [key for each, _ in self.memories for key in each.in_keys]
        self.observed_keys: list[NestedKey] = list(dict.fromkeys([*observed, *self.policy_head.in_keys[1:]]))
        """The observations that are read, and the mask of the actions at the end."""
        states = [key for _, each in self.memories for key in each.in_keys[1:]]
        noise = [] if noise_key is None else [noise_key]
        self.in_keys = list(dict.fromkeys([*self.observed_keys, *states, *noise]))
        self.out_keys = [
            *(key for _, each in self.memories for key in each.out_keys[1:]),
            *head.param_keys,
            keys.VALUE,
            keys.ACTION,
            keys.ACTION_LOG_PROB,
        ]

    @property
    def memories(self) -> list[tuple[TensorDictModule, Backbone]]:
        """Encoder and memory of the actor, and those of a separate critic."""
        critic: Any = self.critic
        return [(self.encoder, self.backbone), (critic[0], critic[1])] if critic else [(self.encoder, self.backbone)]

    @property
    def networks(self) -> list[Any]:
        """All networks in the order in which they run; the sampler comes after them."""
        return [self.encoder, self.backbone, self.fusion, self.policy_head, *self.critic, self.value_head]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Act: one step for each environment. The features stay out of the tensordict.

        Raises:
            NonFiniteError: if an input or a distribution parameter is not finite.
        """
        work = tensordict.select(*self.in_keys, strict=False)
        for module in self.networks:
            work = module(work)
        read = [*self.encoder.in_keys, *self.policy_head.out_keys]
        try:
            work = self.sampler(work)
        except (ValueError, RuntimeError):  # torch's message about NaN names neither entry nor environment
            check_finite(work.reshape(-1).unsqueeze(1), read, is_rollout=False)
            raise
        # Normal distributions accept NaN, and an environment must not get it. (A graph would break at the check.)
        action = work.get(keys.ACTION)
        is_checked = action.is_floating_point() and not torch.compiler.is_compiling()
        if is_checked and not bool(action.sum().isfinite()):
            check_finite(work.reshape(-1).unsqueeze(1), [*read, keys.ACTION], is_rollout=False)
        return tensordict.update(work.select(*self.out_keys, strict=False))

    def get_dist(self, tensordict: TensorDictBase) -> distributions.Distribution:
        """Return the action distribution, and write the joint features, which the value head reads.

        In recurrent mode it runs over sequences [*B, T], from the state of each sequence's first step.
        """
        self.encoder(tensordict)
        self.backbone(tensordict)
        self.policy_head(self.fusion(tensordict))
        return self.sampler.get_dist(tensordict)

    def run_memories(self, tensordict: TensorDictBase) -> dict[NestedKey, Tensor]:
        """Run the encoders and the memories over sequences. Return the states after the last step by their keys."""
        states: dict[NestedKey, Tensor] = {}
        with set_recurrent_mode(True):
            for encoder, backbone in self.memories:
                encoder(tensordict)
                reached = backbone.run(tensordict)
                states |= {key: reached[name] for name, key in backbone.state_keys.items()}
        return states

    @torch.no_grad()
    def act(
        self, obs: Tensor | TensorDictBase, state: State | None = None, *, is_deterministic: bool = True
    ) -> ActionStep:
        """Take one step, with a memory state that you carry from step to step.

        Args:
            obs: observations [B, ...]; a tensordict [B] if the agent reads several keys.
            state: memory state after the previous step, {name: [B, *shape]}; None: episodes begin. The names of the
                critic's own memory begin with "critic_".
            is_deterministic: take the most likely action, not a sample.
        """
        batch = torch.Size(obs.shape[:1])
        tensordict = self._as_tensordict(obs, batch)
        device = next(self.parameters()).device
        tensordict.set(self.backbone.is_init_key, torch.full((*batch, 1), state is None, device=device))
        entries = self._state_entries()
        for name, (key, initial) in entries.items():
            tensordict.set(key, initial.expand(*batch, *initial.shape[1:]) if state is None else state[name])
        exploration = ExplorationType.DETERMINISTIC if is_deterministic else ExplorationType.RANDOM
        with set_exploration_type(exploration), set_recurrent_mode(False):
            played = self(tensordict)
        after = {name: played.get(unravel_key((keys.NEXT, key))) for name, (key, _) in entries.items()}
        return ActionStep(played.get(keys.ACTION), played.get(keys.VALUE).squeeze(-1), after)

    def evaluate_actions(
        self,
        obs: Tensor | TensorDictBase,
        actions: Tensor,
        state: State | TensorDictBase | None = None,
        is_init: Tensor | None = None,
    ) -> ActionEvaluation:
        """Evaluate actions taken along sequences.

        Args:
            obs: observations [B, T, ...]; a tensordict [B, T] if the agent reads several keys.
            actions: [B, T] or [B, T, A].
            state: memory state before the first step, {name: [B, *shape]}; None: the initial state. The names of the
                critic's own memory begin with "critic_".
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
        tensordict = self._as_tensordict(obs, batch)
        entries = self._state_entries()
        if state is None:
            flags = torch.cat([torch.ones_like(flags[:, :1]), flags[:, 1:]], 1)
            state = {name: initial for name, (_, initial) in entries.items()}
        tensordict.set(self.backbone.is_init_key, flags)
        for name, (key, initial) in entries.items():
            value = state[name].expand(batch[0], *state[name].shape[1:]) if state[name] is initial else state[name]
            expected = (batch[0], *initial.shape[1:])
            if value.shape != expected:
                raise ValueError(f"state '{name}' must have shape {expected}; got {tuple(value.shape)}.")
            tensordict.set(key, value.unsqueeze(1).expand(batch[0], batch[1], *value.shape[1:]))
        states = self.run_memories(tensordict)
        with set_recurrent_mode(True):
            self.policy_head(self.fusion(tensordict))
            if self.critic:
                self.critic[2](tensordict)
        dist = self.sampler.get_dist(tensordict)
        value = self.value_head(tensordict).get(keys.VALUE).squeeze(-1)
        after = {name: states[key] for name, (key, _) in entries.items()}
        return ActionEvaluation(dist.log_prob(actions), entropy_of(dist), value, after)

    def get_policy_operator(self) -> ProbabilisticTensorDictSequential:
        """Return the actor alone, in the form that TorchRL's losses and collectors take; parameters are shared."""
        return ProbabilisticTensorDictSequential(
            self.encoder, self.backbone, self.fusion, self.policy_head, self.sampler
        )

    def get_value_operator(self) -> TensorDictSequential:
        """Return the critic alone, from observations to values; parameters are shared."""
        before: Any = self.critic or (self.encoder, self.backbone, self.fusion)
        return TensorDictSequential(*before, self.value_head)

    def get_value_head(self) -> TensorDictModuleBase:
        """Return the critic for a tensordict that `get_dist` has filled.

        A shared critic is only its head, so that one pass of the backbone serves both.
        """
        return self.get_value_operator() if self.critic else self.value_head

    def _as_tensordict(self, obs: Tensor | TensorDictBase, batch: torch.Size) -> TensorDictBase:
        if isinstance(obs, TensorDictBase):
            return obs.copy()
        if len(self.observed_keys) != 1:
            raise ValueError(f"the agent reads {self.observed_keys}: pass obs as a tensordict with these keys.")
        return TensorDict({self.observed_keys[0]: obs}, batch)

    def _state_entries(self) -> dict[str, tuple[NestedKey, Tensor]]:
        """Return the key and the initial value [1, *shape] of each memory state by its name."""
        entries: dict[str, tuple[NestedKey, Tensor]] = {}
        for (_, backbone), prefix in zip(self.memories, ("", "critic_"), strict=False):
            for name, initial in backbone.core.initial_state(1).items():
                entries[prefix + name] = backbone.state_keys[name], initial
        return entries


def entropy_of(dist: distributions.Distribution) -> Tensor:
    """Return the entropy of a distribution, [*B]; for one without a formula, an estimate from one sample."""
    try:
        return dist.entropy()
    except NotImplementedError:  # squashed by tanh
        return -dist.log_prob(dist.rsample())


def _fusion(backbone: Backbone, out_key: str, *, is_gated: bool) -> TensorDictModule:
    network = PastPresentFusion(backbone.core.in_features, backbone.core.out_features, is_gated=is_gated)
    return TensorDictModule(network, in_keys=[backbone.in_key, backbone.out_key], out_keys=[out_key])


def _policy_head(head: ActionHead, action_mask: NestedKey | None, mask_shape: Sequence[int]) -> TensorDictModule:
    if action_mask is None:
        return TensorDictModule(head.network, in_keys=[keys.JOINT_FEATURES], out_keys=head.param_keys)
    if head.param_keys != ["logits"]:
        raise ValueError(f"continuous actions cannot be masked: the environment has an entry '{action_mask}'.")
    network = MaskedLogits(head.network, head.sizes, mask_shape)
    return TensorDictModule(network, in_keys=[keys.JOINT_FEATURES, action_mask], out_keys=head.param_keys)
