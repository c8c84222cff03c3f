"""PPOTrainer: recurrent PPO on any TorchRL collector."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import unravel_key
from torch import Tensor

from cyborg_torchrl import keys
from cyborg_torchrl.collectors.profiling import part, timed
from cyborg_torchrl.config import TrainConfig
from cyborg_torchrl.config.device_values import with_device_values
from cyborg_torchrl.config.presets import with_general_values
from cyborg_torchrl.data import EpisodeBuffer, RecurrentRolloutBuffer, Rollout, RolloutBuffer
from cyborg_torchrl.envs.transforms.normalization import RunningMoments
from cyborg_torchrl.modules.encoders import Autocast
from cyborg_torchrl.modules.nan_check import NonFiniteError, check_finite
from cyborg_torchrl.modules.replay import as_primed, state_after
from cyborg_torchrl.objectives import RecurrentClipPPOLoss, add_advantages, masked_standardize, measure_drift
from cyborg_torchrl.objectives.functional import explained_variance
from cyborg_torchrl.training.distributed import Ranks
from cyborg_torchrl.training.graphed_step import GraphedStep
from cyborg_torchrl.training.mmer import EPOCH_STEPS, EpochReturns
from cyborg_torchrl.training.optimizer import build_optimizer, learning_rate
from cyborg_torchrl.training.optimizer_step import OptimizerStep, check_finite_step

Metrics = dict[str, float]
MAX_RATIO_ERROR, MAX_REDUCED_RATIO_ERROR = 1e-3, 3e-2
"""Limits of the ratio error before the first optimiser step: in float32, and in reduced precision."""


class PPOTrainer:
    """Recurrent PPO: collects rollouts, computes advantages, and trains on sequences from their stored states.

    Args:
        collector: yields rollouts [N, T]: `RolloutCollector`, a collector of TorchRL, or any iterable of such
            tensordicts.
        loss: the objective; its parameters are trained.
        value_operator: computes "state_value" from an observation and a memory state, for bootstrapping.
        buffer: stores each rollout and yields its minibatches.
        config: hyperparameters; None takes the value of the preset `general`.
        on_progress: called with the finished share of the current update, in (0, 1].
        ranks: the processes that train this agent together; None: this process alone. Each has a trainer, a collector
            and a buffer of the same sizes. All start with the parameters of the first, and each optimiser step uses
            their minibatches together. `config.total_timesteps` are the steps of one rank.

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
        self.parameters = [p for p in loss.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        ranks = ranks or Ranks()
        config = with_device_values(with_general_values(config), self.device)
        if ranks.size > 1 or loss.functional or config.optimizer == "rmsprop":
            config = dataclasses.replace(config, cudagraph=False)
        self.collector, self.loss, self.buffer, self.config = collector, loss, buffer, config
        self.value_operator, self.on_progress, self.ranks = value_operator, on_progress, ranks
        read = [key for key in loss.in_keys or () if not (isinstance(key, tuple) and key[0] == keys.NEXT)]
        written = (keys.VALUE, keys.ACTION_LOG_PROB)
        observed = [key for key in read if key not in written]
        # Causes before consequences. Sums of rewards are those before transforms, which may clip infinity.
        self._checked = [*observed, *written, (keys.NEXT, keys.REWARD), (keys.NEXT, keys.EPISODE_REWARD)]
        self._bootstrapped = [unravel_key((keys.NEXT, key)) for key in (*observed, keys.VALUE)]
        self._trained = {*read, keys.IS_INIT, keys.ADVANTAGE, keys.VALUE_TARGET, keys.VALUE}
        self.optimizer = build_optimizer(config, self.parameters)
        self.seconds: dict[str, float] = {}
        """Seconds of each part of the last update."""
        self.num_updates = 0
        self.rate_factor = 1.0
        """Share of the scheduled learning rate that is used (`config.desired_kl`)."""
        self.num_steps = 0
        self.epoch_returns = EpochReturns()
        self.total_updates = max(1, config.total_timesteps // buffer.num_steps)
        self.steps_per_update = buffer.num_steps * self.ranks.size
        self._moments = [module for module in loss.modules() if isinstance(module, RunningMoments)]
        self.step = OptimizerStep(loss, self.parameters, self.optimizer, config, self.ranks)
        self._take_step = GraphedStep(self.step) if config.cudagraph else self.step
        if self.ranks.size > 1:
            self._synchronize()

    def run(self) -> Iterator[Metrics]:
        """Yield the metrics of each update, until the collector ends or `total_timesteps` are reached."""
        if self.num_updates >= self.total_updates:
            return
        rollouts = iter(self.collector)
        while True:
            self.seconds.clear()
            with timed("collect", self.seconds):
                rollout = next(rollouts, None)
            if rollout is None:
                return
            metrics = self.update(rollout)
            del rollout  # frees its memory before the next one is collected
            self.share_parameters()
            yield metrics
            if self.num_updates >= self.total_updates:
                return

    def share_parameters(self) -> None:
        """Send the current parameters to the collector, if it holds a copy of them."""
        getattr(self.collector, "update_policy_weights_", _do_nothing)()

    def update(self, rollout: TensorDictBase | Rollout) -> Metrics:
        """Train on one rollout [N, T]. Return its metrics.

        Raises:
            NonFiniteError: if an entry of the rollout, a loss or the gradient is not finite. The parameters are then
                those of the last finite step.
        """
        self._set_learning_rate()
        self.step.start()
        check_finite(rollout.steps if isinstance(rollout, Rollout) else rollout, self._checked)
        if self.ranks.size > 1:
            for moments in self._moments:
                moments.merge(self.ranks.sum)
        with timed("advantages", self.seconds):
            rollout, metrics = self._prepare(rollout)
        history: dict[str, list[Tensor]] = defaultdict(list)
        with timed("update", self.seconds):
            epochs = self._run_epochs(rollout, history)
            metrics |= self._drift(rollout)
        self.num_updates += 1
        self.num_steps += rollout.steps.numel() * self.ranks.size
        self.epoch_returns.add(self.num_steps, metrics["episodes"], metrics.get("mean_reward"))
        if self.epoch_returns.mmer is not None:
            metrics["mmer"] = self.epoch_returns.mmer
        metrics |= {name: float(torch.stack(values).mean()) for name, values in history.items()}
        # The first minibatch runs before any optimiser step: only there the ratio must be 1.
        metrics["ratio_error"] = float(self.ranks.maximum(history["ratio_error"][0]))
        metrics |= {"epochs": epochs, "learning_rate": float(self.optimizer.param_groups[0]["lr"])}
        self._warn_about_ratio_error(metrics["ratio_error"], rollout.steps.get(keys.VALUE).dtype)
        return metrics

    def close(self) -> None:
        """Shut the collector down, if it has a `shutdown` method."""
        getattr(self.collector, "shutdown", _do_nothing)()

    def state_dict(self) -> dict[str, Any]:
        """Return parameters, optimiser and counters. `collector_state` returns the collector's state."""
        return {
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "num_updates": self.num_updates,
            "num_steps": self.num_steps,
            "rate_factor": self.rate_factor,
            "epoch_returns": self.epoch_returns.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the content of `state_dict`. The optimiser's options stay those of this trainer's configuration."""
        self.loss.load_state_dict(state["loss"])
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": own["param_groups"]})
        self.num_updates, self.num_steps = state["num_updates"], state["num_steps"]
        self.rate_factor = state.get("rate_factor", 1.0)  # older checkpoints have none
        self.epoch_returns = EpochReturns(**state.get("epoch_returns", {"epoch": self.num_steps // EPOCH_STEPS}))

    def _synchronize(self) -> None:
        """Start all ranks with the first one's parameters, and standardise advantages over all of them."""
        self.loss.standardize = self.ranks.standardized
        statistics = {id(buffer) for moments in self._moments for buffer in moments.buffers()}
        tensors = [*self.loss.parameters(), *self.loss.buffers()]
        self.ranks.broadcast_tensors(tensor for tensor in tensors if id(tensor) not in statistics)

    def _prepare(self, rollout: TensorDictBase | Rollout) -> tuple[Rollout, Metrics]:
        """Add advantages to a rollout and store it. Return it with the needed memory states, and its metrics."""
        config = self.config
        steps = rollout.steps if isinstance(rollout, Rollout) else rollout
        add_advantages(steps, self.value_operator, gamma=config.gamma, gae_lambda=config.gae_lambda)
        if not bool(steps.get(keys.ADVANTAGE).sum().isfinite()):  # an episode's last observation is used only here
            check_finite(steps, self._bootstrapped)
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
        trained.set(keys.LOCATION, _locations(*steps.shape, device=steps.get(keys.ADVANTAGE).device))
        with self.loss.policy() as policy:
            self.buffer.store(Rollout(trained, rollout.stored_states, rollout.state_steps), policy)
        return rollout, metrics

    def _run_epochs(self, rollout: Rollout, history: dict[str, list[Tensor]]) -> int:
        """Train on the stored rollout, and append the metrics of each step. Return the number of epochs."""
        config = self.config
        num_epochs = cast("int", config.n_epochs)  # None was replaced in the constructor
        epoch, steps_before = 0, 0
        for epoch in range(1, num_epochs + 1):
            if epoch > 1 and config.refresh_states:
                self._refresh(rollout)
            steps_before = len(history["kl_approx"])
            self._run_epoch(rollout, history)
            kl = torch.stack(history["kl_approx"][steps_before:]).mean()
            if epoch == num_epochs or (config.target_kl is not None and kl > 1.5 * config.target_kl):
                break
            self.on_progress(epoch / num_epochs)
        if config.desired_kl:
            self._adapt_rate(float(torch.stack(history["kl"][steps_before:]).mean()), config.desired_kl)
        self.on_progress(1.0)
        return epoch

    def _run_epoch(self, rollout: Rollout, history: dict[str, list[Tensor]]) -> None:
        batches = iter(self.buffer)
        steps_before = len(history["grad_norm"])
        try:
            while True:
                with part("minibatches"):
                    batch = next(batches, None)  # a rank without a minibatch takes part in the steps of the others
                metrics = self._take_step(batch)
                if not metrics:
                    break
                for name, value in metrics.items():
                    history[name].append(value)
            self._check_epoch(history, steps_before)
        except NonFiniteError as error:
            raise self._with_location(error, rollout) from None

    def _check_epoch(self, history: dict[str, list[Tensor]], steps_before: int) -> None:
        """Raise NonFiniteError for the first step of an epoch whose gradient is not finite."""
        is_finite = torch.stack(history["grad_norm"][steps_before:]).isfinite()
        if not bool(is_finite.all()):
            index = steps_before + int(is_finite.to(torch.uint8).argmin())
            check_finite_step({name: values[index] for name, values in history.items()})

    def _with_location(self, error: NonFiniteError, rollout: Rollout) -> NonFiniteError:
        """Return the error with a stored sequence that causes it alone; as it is if there is none."""
        for batch in self.buffer:
            if self.step.has_finite_gradient(batch):
                continue
            for row in range(len(batch)):
                part = batch[row : row + 1]
                if self.step.has_finite_gradient(part):
                    continue
                environment, step = part.get(keys.LOCATION).reshape(-1, 2)[0].tolist()
                record = {"row": part.detach().cpu().to_dict(), "steps": rollout.steps[environment].cpu().to_dict()}
                hint = "in the sequence that begins there, while it was trained"
                return NonFiniteError(error.key, error.value, environment, step, record, hint)
        return error

    def _refresh(self, rollout: Rollout) -> None:
        """Recompute the stored states with the current parameters, from the rollout's first states."""
        if not isinstance(self.buffer, RecurrentRolloutBuffer) or rollout.stored_states.is_empty():
            return
        states = [rollout.stored_states[:, 0]]
        with self.loss.policy() as policy:
            for begin, end in itertools.pairwise(rollout.state_steps):
                state = state_after(policy, rollout.steps[:, begin:end], states[-1], self.loss.state_keys)
                states.append(as_primed(state, rollout.steps.get(keys.IS_INIT)[:, end]))
        self.buffer.replace_states(Rollout(rollout.steps, torch.stack(states, 1), rollout.state_steps))

    def _drift(self, rollout: Rollout, max_envs: int = 4, max_chunks: int = 4) -> Metrics:
        """Return the state drift of some chunks of some environments; zero if chunks use only the first state."""
        buffer = self.buffer
        has_states = isinstance(buffer, RecurrentRolloutBuffer) and not rollout.stored_states.is_empty()
        if not has_states or rollout.steps.shape[1] < 2 * buffer.seq_len:
            return {"state_drift": 0.0}
        steps = rollout.steps[:max_envs].to(self.device)
        num_chunks = steps.shape[1] // buffer.seq_len
        chunks = torch.linspace(1, num_chunks - 1, min(max_chunks, num_chunks - 1)).long().unique()
        sequences = buffer.chunks(chunks, steps.shape[0]).to(self.device)
        first_states = rollout.stored_states[:max_envs, 0].to(self.device)
        drift = measure_drift(self.loss, steps, first_states, sequences, (chunks * buffer.seq_len).tolist())
        return {name: float(self.ranks.mean(value)) for name, value in drift.items()}

    def _set_learning_rate(self) -> None:
        rate = self.rate_factor * learning_rate(self.config, self.num_updates / self.total_updates)
        rate = float(torch.tensor(rate, dtype=torch.float32))  # so that it is the same with and without a CUDA graph
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # a CUDA graph reads this address
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _adapt_rate(self, kl: float, desired_kl: float) -> None:
        """Take smaller steps after an update that moved the policy too far; never larger ones than scheduled."""
        if kl > 2.0 * desired_kl:
            self.rate_factor /= 1.5
        elif kl < desired_kl / 2.0:
            self.rate_factor = min(1.0, 1.5 * self.rate_factor)

    def _warn_about_ratio_error(self, ratio_error: float, recorded: torch.dtype) -> None:
        """Warn if the update does not see the states that the agent acted with.

        Args:
            ratio_error: the largest |log ratio| before the first optimiser step.
            recorded: type of the recorded values, which shows whether the agent acted under autocast.
        """
        if self.config.start_state == "initial" or not self.ranks.is_first:
            return  # such states are expected, or the first rank warns
        reduced: list[str] = []
        if self.config.state_dtype != "float32":
            reduced.append(f"states stored as {self.config.state_dtype}")
        if any(isinstance(module, Autocast) for module in self.loss.modules()):
            reduced.append("an encoder in reduced precision")
        if torch.is_autocast_enabled(self.device.type) or recorded in (torch.bfloat16, torch.float16):
            reduced.append("torch.autocast")
        limit = MAX_REDUCED_RATIO_ERROR if reduced else MAX_RATIO_ERROR
        if ratio_error <= limit:
            return
        differ = f"the update's log-probs differ from the rollout's by up to {ratio_error:.2g} (expected < {limit:g})"
        text = (
            f"before the first optimiser step {differ}: the update does not see the memory states that the agent acted "
            "with. Is the primer on the environment, and are the state keys the buffer's?"
        )
        if reduced:
            text = f"{' and '.join(reduced)} make {differ}: use float32."
        warnings.warn(text, stacklevel=3)


def rollout_metrics(rollout: TensorDictBase, ranks: Ranks) -> Metrics:
    """Return the metrics of all ranks' rollouts: finished episodes, mean return, success if the task reports it.

    The explained variance is the mean over ranks.
    """
    after = rollout.get(keys.NEXT)
    done = after.get(keys.DONE)
    explained = explained_variance(rollout.get(keys.VALUE), rollout.get(keys.VALUE_TARGET))
    metrics = {
        "episodes": float(ranks.sum(done.sum())),
        "reward_per_step": float(ranks.moments(after.get(keys.REWARD))[1]),
        "explained_variance": float(ranks.mean(explained)),
    }
    for key, name in ((keys.EPISODE_REWARD, "mean_reward"), (keys.SUCCESS, "success_rate")):
        value = after.get(key, None)
        if value is None or not metrics["episodes"]:
            continue
        ended = value[done]
        if key != keys.SUCCESS or ranks.sum((~ended.isnan()).sum()):  # NaN where an environment never reported success
            metrics[name] = float(ranks.moments(ended.nan_to_num(0.0))[1])
    return metrics


def _do_nothing() -> None:
    """Replace a method that a collector does not have."""


def _locations(num_envs: int, num_steps: int, device: torch.device | None) -> Tensor:
    """Return (environment, step) of each step of a rollout, [N, T, 2] int32."""
    environments = torch.arange(num_envs, dtype=torch.int32, device=device)
    steps = torch.arange(num_steps, dtype=torch.int32, device=device)
    return torch.stack(torch.meshgrid(environments, steps, indexing="ij"), -1)
