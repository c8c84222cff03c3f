"""ClipPPOLoss for agents with memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor
from torchrl.objectives import ClipPPOLoss

from cyborg_torchrl import keys
from cyborg_torchrl.cores import Core
from cyborg_torchrl.modules import Backbone, PPOAgent
from cyborg_torchrl.modules.replay import acting_policy, as_primed, memory_state_keys, state_after, with_states
from cyborg_torchrl.objectives.functional import masked_standardize


class RecurrentClipPPOLoss(ClipPPOLoss):
    """PPO's clipped objective over sequences [B, T], from the memory state that the agent acted with.

    The batches are those of `RecurrentRolloutBuffer`: each sequence begins with its stored state. The agent, or any
    TorchRL recurrent policy, runs once over it, for actor and critic together. Gradients reach back to the first step.
    Keys, options and `loss_*` names are those of TorchRL's `ClipPPOLoss`. The differences:

    - Advantages are normalised over the trained steps only, where ("collector", "mask") is true.
    - `ratio_error` is the largest |log ratio|. Before the first optimiser step it is zero if and only if the update
      sees the same states as the rollout.
    - The regularisers of a core are added as `loss_memory_<name>`, and its metrics are logged as `memory_<name>`.
      With a separate critic there are also `loss_critic_memory_<name>` and `critic_memory_<name>`.
    - Steps marked by ("collector", "burn_in") are replayed first, without gradient, and have no loss.

    Args:
        actor_network: a `PPOAgent`, or a TorchRL probabilistic policy.
        critic_network: the critic; None for a `PPOAgent`, which has one. A head that reads the actor's output saves a
            second pass of the backbone.
        functional: as in TorchRL; False by default, since nothing here needs detached parameters.
        **options: those of `ClipPPOLoss`.

    Raises:
        ValueError: if `separate_losses` would lose the regulariser of the critic's core.
    """

    def __init__(
        self,
        actor_network: TensorDictModuleBase,
        critic_network: TensorDictModuleBase | None = None,
        *,
        functional: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(actor_network, PPOAgent) and critic_network is None:
            critic_network = actor_network.get_value_head()
            if functional:
                actor_network = actor_network.get_policy_operator()
        super().__init__(actor_network, critic_network, functional=functional, **options)
        self.state_keys = memory_state_keys(actor_network)
        if critic_network is not None:  # a critic may have a separate memory
            self.state_keys = list(dict.fromkeys([*self.state_keys, *memory_state_keys(critic_network)]))
        self.standardize: Callable[[Tensor, Tensor | None], Tensor] | None = None
        """Replacement for standardising the advantages of each minibatch, called with advantages and mask."""
        self._log_weights = torch.zeros(1)
        self._is_checked = False
        self._memory_metrics: dict[str, Tensor] = {}
        self._critic_memory_metrics: dict[str, Tensor] = {}
        core, critic_core = _core_of(actor_network), None
        if critic_network is not None:
            critic_core = _core_of(critic_network, other_than=core)
        self._regularize = None if core is None else core.regularize
        self._regularize_critic = None if critic_core is None else critic_core.regularize
        self._is_regularized = _has_regularizer(core) or _has_regularizer(critic_core)
        if self.separate_losses and _has_regularizer(critic_core):
            raise ValueError("separate_losses would lose the regulariser of the critic's memory: leave it out.")

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the losses and metrics of a batch of sequences, [B, T].

        Raises:
            ValueError: if the policy has memory and the batch holds no sequences.
        """
        if self.state_keys:
            self._check_sequences(tensordict)
        tensordict = self.after_burn_in(tensordict)
        losses = super().forward(tensordict)
        losses.set("ratio_error", self._log_weights.abs().max())
        # TorchRL's kl_approx is the mean of -log ratio. This estimate has less noise, and is never negative.
        losses.set("kl", (self._log_weights.expm1() - self._log_weights).mean())
        if tensordict.get(keys.TRAIN_MASK, None) is not None:
            losses.update(self._metrics_of_trained_steps())
        self._add_memory_losses(losses, "memory", self._memory_metrics, self._regularize)
        self._add_memory_losses(losses, "critic_memory", self._critic_memory_metrics, self._regularize_critic)
        return losses

    def loss_critic(self, tensordict: TensorDictBase) -> tuple[Any, ...]:
        """Return the critic's loss, as TorchRL computes it."""
        if self._regularize_critic is None:
            return super().loss_critic(tensordict)
        tensordict = tensordict.exclude(keys.MEMORY_METRICS)  # those of the actor
        result = super().loss_critic(tensordict)
        self._critic_memory_metrics = _metrics_of_cores(tensordict)
        return result

    @staticmethod
    def _add_memory_losses(
        losses: TensorDictBase,
        prefix: str,
        metrics: dict[str, Tensor],
        regularize: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
    ) -> None:
        """Add the regularisers of a core, and its metrics."""
        if not metrics or regularize is None:
            return
        for name, value in regularize(metrics).items():
            losses.set(f"loss_{prefix}_{name}", value)
        for name, value in metrics.items():
            losses.set(f"{prefix}_{name}", value.detach().mean())

    def _check_sequences(self, tensordict: TensorDictBase) -> None:
        """Check once for mistakes of a buffer or sampler that would otherwise stay silent."""
        if tensordict.ndim < 2:
            raise ValueError(
                f"the loss of a policy with memory takes sequences [B, T]; got a batch {list(tensordict.batch_size)}. "
                "Steps in shuffled order have lost their past: use RecurrentRolloutBuffer, or rows of consecutive "
                "steps. batch.reshape(-1, slice_len) turns a flat batch of slices into sequences."
            )
        if self._is_checked:
            return
        self._is_checked = True
        first = tensordict[:, 0]
        is_init = first.get(keys.IS_INIT, None)
        if is_init is None:
            return
        states = first.select(*self.state_keys, strict=False)[is_init.reshape(-1)]
        if any(bool((states.get(key) != 0).any()) for key in states.keys(True, True)):
            warnings.warn(
                f"{keys.IS_INIT!r} is set at the first step of sequences whose stored state is not zero: memory "
                "restarts there, and the update does not see what the agent saw. A sampler may mark the starts of "
                "slices: give SliceSampler its traj_key and init_key=None.",
                stacklevel=4,
            )

    def after_burn_in(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Replay the burn-in steps without gradient, and return the other steps, from the states reached by then."""
        is_burn_in = tensordict.get(keys.BURN_IN, None)
        if is_burn_in is None:
            return tensordict
        replayed = is_burn_in.squeeze(-1).sum(1)
        seq_len = int(tensordict.get(keys.TRAIN_MASK).squeeze(-1).sum(1).max())
        offsets = torch.arange(seq_len, device=replayed.device)
        rows = torch.arange(len(replayed), device=replayed.device).unsqueeze(1)
        trained = tensordict.exclude(*self.state_keys)[rows, (replayed.unsqueeze(1) + offsets)]
        states = tensordict.select(*self.state_keys, strict=False)[:, 0].clone()
        with self.policy() as policy:
            for length in replayed.unique().tolist():
                if length and not states.is_empty():
                    of_length = replayed == length
                    burn_in = tensordict[of_length][:, :length]
                    states[of_length] = state_after(policy, burn_in, states[of_length], self.state_keys)
        trained = trained.exclude(keys.BURN_IN)
        if bool(trained.get(keys.TRAIN_MASK).all()):
            trained = trained.exclude(keys.TRAIN_MASK)
        return with_states(trained, as_primed(states, trained.get(keys.IS_INIT)[:, 0]))

    @property
    def is_mean_over_steps(self) -> bool:
        """True if the loss of a batch is the mean over its steps: weighted parts of it then give the same gradient."""
        return not self.normalize_advantage and not self._is_regularized

    @contextmanager
    def actor(self) -> Generator[TensorDictModuleBase]:
        """Give access to the actor with its parameters, also where `functional` has taken them out."""
        if not self.functional:
            yield self.actor_network
            return
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            yield self.actor_network

    @contextmanager
    def policy(self) -> Generator[TensorDictModuleBase]:
        """Give access to the actor, together with a critic that has a separate memory."""
        with self.actor() as actor:
            if not self.functional or self.critic_network is None:
                yield acting_policy(actor, self.critic_network)
                return
            with self.critic_network_params.to_module(self.critic_network, preserve_module_state=False):
                yield acting_policy(actor, self.critic_network)

    def _metrics_of_trained_steps(self) -> dict[str, Tensor]:
        """Return the metrics that TorchRL computes over all steps, padding included."""
        ratio = self._log_weights.exp()
        is_clipped = self._log_weights.clamp(*self._clip_bounds) != self._log_weights
        return {
            "kl_approx": -self._log_weights.mean(),
            "clip_fraction": is_clipped.to(ratio.dtype).mean(),
            "max_ratio": ratio.max(),
            "mean_ratio": ratio.mean(),
        }

    def _log_weight(self, tensordict: TensorDictBase, adv_shape: torch.Size) -> tuple[Any, ...]:
        result = super()._log_weight(tensordict, adv_shape)
        mask = tensordict.get(keys.TRAIN_MASK, None)
        log_weights = result[0].detach().reshape(-1)
        self._log_weights = log_weights if mask is None else log_weights[mask.reshape(-1)]
        self._memory_metrics = _metrics_of_cores(tensordict)
        return result

    def _standardize_advantage(self, advantage: Tensor, tensordict: TensorDictBase) -> Tensor:
        mask = tensordict.get(keys.TRAIN_MASK, None)
        if self.standardize is not None:
            return self.standardize(advantage, None if mask is None else mask.reshape(advantage.shape))
        if mask is None:
            return super()._standardize_advantage(advantage, tensordict)
        if self.normalize_advantage_exclude_dims:
            raise ValueError("normalize_advantage_exclude_dims does not go together with a mask of trained steps.")
        return masked_standardize(advantage, mask.reshape(advantage.shape))


def _core_of(network: TensorDictModuleBase, other_than: Core | None = None) -> Core | None:
    """Return the core of the first backbone in a network that has another core; None if there is none."""
    cores = (module.core for module in network.modules() if isinstance(module, Backbone))
    return next((core for core in cores if core is not other_than), None)


def _has_regularizer(core: Core | None) -> bool:
    return core is not None and type(core).regularize is not Core.regularize


def _metrics_of_cores(tensordict: TensorDictBase) -> dict[str, Tensor]:
    """Return the metrics that a core has written, at the trained steps alone."""
    metrics, mask = tensordict.get(keys.MEMORY_METRICS, None), tensordict.get(keys.TRAIN_MASK, None)
    is_trained = slice(None) if mask is None else mask.reshape(-1)
    return {} if metrics is None else {name: value.reshape(-1)[is_trained] for name, value in metrics.items()}
