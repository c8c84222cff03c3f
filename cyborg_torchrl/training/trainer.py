"""PPOTrainer: recurrent PPO on any TorchRL collector."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn

from cyborg_torchrl import keys
from cyborg_torchrl.config import TrainConfig
from cyborg_torchrl.data import EpisodeBuffer, RecurrentRolloutBuffer, Rollout, RolloutBuffer
from cyborg_torchrl.envs.transforms.normalization import RunningMoments
from cyborg_torchrl.modules.encoders import Autocast
from cyborg_torchrl.modules.nan_check import NonFiniteError, check_finite, environment_of
from cyborg_torchrl.modules.replay import as_primed, state_after
from cyborg_torchrl.objectives import RecurrentClipPPOLoss, add_advantages, masked_standardize, measure_drift
from cyborg_torchrl.training.distributed import JointStep, Ranks
from cyborg_torchrl.training.rollout_metrics import rollout_metrics

Metrics = dict[str, float]
LOGGED = ("loss_objective", "loss_critic", "loss_entropy", "entropy", "kl_approx", "clip_fraction", "ratio_error")
DISHONEST_RATIO_ERROR, REDUCED_RATIO_ERROR = 1e-3, 3e-2


class PPOTrainer:
    """Collects rollouts, computes advantages for each environment by itself, and updates from the stored states.

    Args:
        collector: yields rollouts [N, T]: our `RolloutCollector`, any of TorchRL's, any iterable of such tensordicts.
        loss: the objective; its parameters are trained.
        value_operator: from an observation and a memory state to "state_value", for bootstrapping.
        buffer: where rollouts are kept for the update.
        config: hyperparameters.
        on_progress: called with the share of the present update that is done, in (0, 1].
        ranks: the processes that train this agent together, each with a trainer, a collector and a buffer of the same
            sizes: they begin with the first one's parameters, and every step is that of all their minibatches
            together. `config.total_timesteps` are those of one rank. None: this process alone.

    Examples: see `examples/compose_with_torchrl.py`.
    """

    def __init__(
        self,
        collector: Iterable[TensorDictBase | Rollout],
        loss: RecurrentClipPPOLoss,
        value_operator: TensorDictModuleBase,
        buffer: RolloutBuffer | RecurrentRolloutBuffer | EpisodeBuffer,
        config: TrainConfig,
        on_progress: Callable[[float], None] = lambda share: None,
        ranks: Ranks | None = None,
    ) -> None:
        self.collector, self.loss, self.buffer, self.config = collector, loss, buffer, config
        self.value_operator, self.on_progress, self.ranks = value_operator, on_progress, ranks or Ranks()
        read = [key for key in loss.in_keys or () if not (isinstance(key, tuple) and key[0] == keys.NEXT)]
        written = (keys.VALUE, keys.ACTION_LOG_PROB)
        observed = [key for key in read if key not in written]
        self._checked = [*observed, *written, (keys.NEXT, keys.REWARD)]  # causes before consequences
        self._trained = {*read, keys.IS_INIT, keys.ADVANTAGE, keys.VALUE_TARGET, keys.VALUE}
        self.parameters = [p for p in loss.parameters() if p.requires_grad]
        is_fusable = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in self.parameters)
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=config.learning_rate, eps=config.adam_eps, fused=is_fusable
        )
        self.num_updates = 0
        self.num_steps = 0
        self.total_updates = max(1, config.total_timesteps // buffer.num_steps)
        self.steps_per_update = buffer.num_steps * self.ranks.size
        self._moments = [module for module in loss.modules() if isinstance(module, RunningMoments)]
        self._joint_step = JointStep(self.ranks, self.parameters)
        if self.ranks.size > 1:
            loss.standardize = self.ranks.standardized
            own = {id(buffer) for moments in self._moments for buffer in moments.buffers()}
            self.ranks.give_to_all(t for t in (*loss.parameters(), *loss.buffers()) if id(t) not in own)

    def run(self) -> Iterator[Metrics]:
        """Yields the metrics of each update, until the collector ends or `total_timesteps` are taken."""
        if self.num_updates >= self.total_updates:
            return
        for rollout in self.collector:
            metrics = self.update(rollout)
            del rollout  # before there is another one
            self.share_parameters()
            yield metrics
            if self.num_updates >= self.total_updates:
                return

    def share_parameters(self) -> None:
        """Lets the collector act with the present parameters, where it has a copy of them."""
        share = getattr(self.collector, "update_policy_weights_", None)
        if share is not None:
            share()

    def update(self, rollout: TensorDictBase | Rollout) -> Metrics:
        """Trains on one rollout [N, T]. Returns what happened, as numbers.

        Raises:
            NonFiniteError: if something that is trained on, a loss or the gradient is not finite; parameters are then
                those of the last step that was.
        """
        config = self.config
        self._set_learning_rate()
        steps = rollout.steps if isinstance(rollout, Rollout) else rollout
        check_finite(steps, self._checked)
        if self.ranks.size > 1:
            for moments in self._moments:
                moments.merge(self.ranks.sum)
        rollout, metrics = self._prepare(rollout)
        num_steps = rollout.steps.numel() * self.ranks.size
        figures: dict[str, list[torch.Tensor]] = defaultdict(list)
        epochs = 0
        for epoch in range(config.n_epochs):
            if epoch and config.refresh_states:
                self._refresh(rollout)
            kl_before = len(figures["kl_approx"])
            batches = iter(self.buffer)
            while step := self._located_step(next(batches, None), rollout):
                for name, value in step.items():
                    figures[name].append(value)
            epochs = epoch + 1
            self.on_progress(epochs / config.n_epochs)
            kl = torch.stack(figures["kl_approx"][kl_before:]).mean()
            if config.target_kl is not None and kl > 1.5 * config.target_kl:
                self.on_progress(1.0)
                break
        metrics |= self._drift(rollout)
        self.num_updates, self.num_steps = self.num_updates + 1, self.num_steps + num_steps
        metrics |= {name: float(torch.stack(values).mean()) for name, values in figures.items()}
        # the very first minibatch is evaluated before any optimiser step
        metrics["ratio_error"] = float(self.ranks.maximum(figures["ratio_error"][0]))
        metrics |= {"epochs": epochs, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        self._check_honesty(metrics["ratio_error"])
        return metrics

    def close(self) -> None:
        """Shuts the collector down, if it needs to be."""
        shutdown = getattr(self.collector, "shutdown", None)
        if shutdown is not None:
            shutdown()

    def state_dict(self) -> dict[str, Any]:
        """Parameters, optimiser and counters; where the collector stands is told by `collector_state`."""
        return {
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "num_updates": self.num_updates,
            "num_steps": self.num_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_updates, self.num_steps = state["num_updates"], state["num_steps"]

    def _prepare(self, rollout: TensorDictBase | Rollout) -> tuple[Rollout, Metrics]:
        """Adds advantages, keeps the states that are needed, and stores."""
        config = self.config
        steps = rollout.steps if isinstance(rollout, Rollout) else rollout
        add_advantages(steps, self.value_operator, gamma=config.gamma, gae_lambda=config.gae_lambda)
        metrics = rollout_metrics(steps, self.ranks)
        if config.normalize_advantage in ("rollout", "step"):
            advantage = steps.get(keys.ADVANTAGE)
            if config.normalize_advantage == "step":
                advantage = advantage - self.ranks.mean(advantage.mean(0))
            standardized = masked_standardize if self.ranks.size == 1 else self.ranks.standardized
            steps.set(keys.ADVANTAGE, standardized(advantage))
        if not isinstance(rollout, Rollout):
            rollout = Rollout.from_steps(rollout, self.loss.state_keys, self.buffer.state_steps(steps.shape[1]))
        trained = steps.select(*self._trained, strict=False)
        self.buffer.store(Rollout(trained, rollout.stored_states, rollout.state_steps), self.loss.actor_network)
        return rollout, metrics

    def _refresh(self, rollout: Rollout) -> None:
        """Replaces the stored states by those that the present parameters give, from the rollout's first on."""
        if not isinstance(self.buffer, RecurrentRolloutBuffer) or rollout.stored_states.is_empty():
            return
        states = [rollout.stored_states[:, 0]]
        with self.loss.actor() as actor:
            for begin, end in itertools.pairwise(rollout.state_steps):
                state = state_after(actor, rollout.steps[:, begin:end], states[-1], self.loss.state_keys)
                states.append(as_primed(state, rollout.steps.get(keys.IS_INIT)[:, end]))
        self.buffer.replace_states(Rollout(rollout.steps, torch.stack(states, 1), rollout.state_steps))

    def _drift(self, rollout: Rollout, max_envs: int = 4, max_chunks: int = 4) -> Metrics:
        """The drift of some chunks of some environments; zero where no stored state is used but the first."""
        steps, buffer = rollout.steps[:max_envs].to(self.parameters[0].device), self.buffer
        whole = steps.shape[1] // buffer.seq_len if isinstance(buffer, RecurrentRolloutBuffer) else 1
        if not isinstance(buffer, RecurrentRolloutBuffer) or whole < 2 or rollout.stored_states.is_empty():
            return {"state_drift": 0.0}
        chunks = torch.linspace(1, whole - 1, min(max_chunks, whole - 1)).long().unique()
        used = buffer.chunks(chunks, steps.shape[0]).to(self.parameters[0].device)
        begin = [int(chunk) * buffer.seq_len for chunk in chunks]
        figures = measure_drift(self.loss, steps, rollout.stored_states[:max_envs, 0].to(steps.device), used, begin)
        return {name: float(self.ranks.mean(value)) for name, value in figures.items()}

    def _located_step(self, batch: TensorDictBase | None, rollout: Rollout) -> dict[str, torch.Tensor]:
        try:
            return self._step(batch)
        except NonFiniteError as error:
            raise (error if batch is None else self._located(error, batch, rollout)) from None

    def _step(self, batch: TensorDictBase | None) -> dict[str, torch.Tensor]:
        """An optimiser step on a minibatch; None where this rank has no more. Nothing is done once no rank has."""
        self.optimizer.zero_grad()
        figures: dict[str, torch.Tensor] = {}
        for part, share in self._parts(batch):
            losses = self.loss(part.to(self.parameters[0].device))
            terms = [value for name, value in losses.items() if name.startswith("loss_")]
            (torch.stack(terms).sum() * share).backward()
            for name, value in losses.items():
                if name == "ratio_error":
                    figures[name] = torch.maximum(value.detach(), figures.get(name, value.detach()))
                elif name in LOGGED or "memory_" in name:
                    figures[name] = figures.get(name, 0.0) + value.detach() * share
        if self.ranks.size > 1:
            own = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            if not math.isfinite(own):  # here, so that it is said where it comes from, and not by all
                self._refuse(figures, float(own))
            if batch is None and self.loss.normalize_advantage:
                self.ranks.standardized(torch.zeros(0))  # as the others do within the loss
            figures |= self._joint_step.averaged(figures, 0.0 if batch is None else _num_trained(batch))
        if not figures:
            return {}
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if not math.isfinite(grad_norm):  # one step with it, and there is nothing left to save
            self._refuse(figures, float(grad_norm))
        self.optimizer.step()
        return figures | {"grad_norm": grad_norm.detach()}

    def _parts(self, batch: TensorDictBase | None) -> list[tuple[TensorDictBase, float]]:
        """A minibatch in parts of whole rows, each with its share of the trained steps: the gradients add up."""
        if batch is None:
            return []
        limit = self.config.micro_batch_steps
        if limit is None or batch.numel() <= limit or not self.loss.is_mean_over_steps:
            return [(batch, 1.0)]
        rows = max(1, limit // (batch.numel() // len(batch)))
        parts = batch.split(-(-len(batch) // -(-len(batch) // rows)))
        trained = [_num_trained(part) for part in parts]
        return [(part, steps / sum(trained)) for part, steps in zip(parts, trained, strict=True) if steps]

    def _refuse(self, figures: dict[str, torch.Tensor], grad_norm: float) -> NoReturn:
        losses = {name: float(value) for name, value in figures.items() if name.startswith("loss_")}
        broken = [(name, value) for name, value in losses.items() if not math.isfinite(value)]
        raise NonFiniteError(*(broken or [("gradient", grad_norm)])[0])

    def _located(self, error: NonFiniteError, batch: TensorDictBase, rollout: Rollout) -> NonFiniteError:
        """The same, with the first sequence of the minibatch that by itself gives such a loss or gradient."""
        self.loss.standardize = None  # the other ranks are not asked
        for row in range(len(batch)):
            part = batch[row : row + 1]
            self.optimizer.zero_grad()
            losses = self.loss(part.to(self.parameters[0].device))
            torch.stack([value for name, value in losses.items() if name.startswith("loss_")]).sum().backward()
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            if all(bool(gradient.isfinite().all()) for gradient in gradients):
                continue
            log_probs = [td.get(keys.ACTION_LOG_PROB).reshape(td.shape).cpu() for td in (part, rollout.steps)]
            environment, step = environment_of(*log_probs)[0]
            record = {"row": part.detach().cpu().to_dict(), "steps": rollout.steps[environment].cpu().to_dict()}
            return NonFiniteError(
                error.key,
                error.value,
                environment,
                step,
                record,
                "in the sequence that begins there, while it was trained",
            )
        return error

    def _set_learning_rate(self) -> None:
        left = 1.0 - self.num_updates / self.total_updates if self.config.lr_schedule == "linear" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * max(left, 0.0)

    def _check_honesty(self, ratio_error: float) -> None:
        if self.config.start_state == "initial" or not self.ranks.is_first:
            return  # asked for, or said by another
        reduced = {f"states stored as {self.config.state_dtype}": self.config.state_dtype != "float32"}
        reduced["an encoder in reduced precision"] = any(isinstance(m, Autocast) for m in self.loss.modules())
        what = " and ".join(name for name, holds in reduced.items() if holds)
        if what and ratio_error > REDUCED_RATIO_ERROR:
            warnings.warn(
                f"{what} make the update's log-probs differ from the rollout's by up to {ratio_error:.2g} (expected < "
                f"{REDUCED_RATIO_ERROR:g}): use float32.",
                stacklevel=3,
            )
        elif not what and ratio_error > DISHONEST_RATIO_ERROR:
            warnings.warn(
                f"before the first optimiser step the update's log-probs differ from the rollout's by up to "
                f"{ratio_error:.2g} (expected < {DISHONEST_RATIO_ERROR:g}): the update does not see the memory states "
                "that the agent acted with. Is the primer on the environment, and are the state keys the buffer's?",
                stacklevel=3,
            )


def _num_trained(batch: TensorDictBase) -> float:
    """Steps of a minibatch that get a loss."""
    mask = batch.get(keys.TRAIN_MASK, None)
    return float(batch.numel() if mask is None else mask.sum())
