"""An optimiser step on a minibatch: losses, gradients of this process or of all ranks, clipping, parameters."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from cyborg_torchrl import keys
from cyborg_torchrl.collectors.profiling import part
from cyborg_torchrl.config import TrainConfig
from cyborg_torchrl.data.chunks import ceil_div
from cyborg_torchrl.modules.nan_check import NonFiniteError
from cyborg_torchrl.objectives import RecurrentClipPPOLoss
from cyborg_torchrl.training.distributed import Ranks

LOGGED = ("loss_objective", "loss_critic", "loss_entropy", "entropy", "kl", "kl_approx", "clip_fraction", "ratio_error")


class OptimizerStep:
    """Steps of an optimiser that wait for no number of the device.

    After a gradient that is not finite, parameters no longer change. The trainer reads the norms of all gradients at
    the end of an epoch, and raises the error then. Optimisers that are not fused (RMSprop), and several ranks, read a
    number at each step.

    Args:
        loss: the objective.
        parameters: the parameters that are trained.
        optimizer: the optimiser of these parameters.
        config: hyperparameters.
        ranks: the processes that train together.
    """

    def __init__(
        self,
        loss: RecurrentClipPPOLoss,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        ranks: Ranks,
    ) -> None:
        self.loss, self.parameters, self.optimizer, self.config, self.ranks = loss, parameters, optimizer, config, ranks
        self.device = parameters[0].device
        self._stopped = torch.zeros((), device=self.device)
        self._can_skip = bool(optimizer.defaults.get("fused"))
        if self._can_skip:
            optimizer.found_inf = self._stopped  # pyright: ignore[reportAttributeAccessIssue]  # fused optimisers skip a step where it is 1
        self._metric_names: list[str] = []

    def start(self) -> None:
        """Begin an update: steps are taken again."""
        self._stopped.zero_()

    def __call__(self, batch: TensorDictBase | None) -> dict[str, Tensor]:
        """Take a step on a minibatch. Return its metrics, {} if no rank has a minibatch.

        Args:
            batch: sequences [B, T], or steps [B]; None if this rank has no more.

        Raises:
            NonFiniteError: if the gradient is not finite, and this is known without waiting for a GPU.
        """
        self.optimizer.zero_grad()
        metrics = self._average_over_ranks(self.backward(batch), batch)
        if not metrics:
            return {}
        with part("optimizer"):
            grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm).detach()
            torch.maximum(self._stopped, (~grad_norm.isfinite()).to(self._stopped.dtype), out=self._stopped)
            metrics["grad_norm"] = grad_norm
            if not self._can_skip:
                check_finite_step(metrics)
            self.optimizer.step()
        return metrics

    def backward(self, batch: TensorDictBase | None) -> dict[str, Tensor]:
        """Compute the gradients of a minibatch. Return its metrics, {} without a minibatch."""
        parts = self._parts(batch)
        found: list[dict[str, Tensor]] = []
        for rows, share in parts:
            with part("forward"):
                losses = self.loss(rows.to(self.device))
            with part("backward"):
                total = torch.stack([value for name, value in losses.items() if name.startswith("loss_")]).sum()
                (total * share).backward()
            found.append({name: value.detach() for name, value in losses.items() if _is_logged(name)})
        if len(parts) < 2:
            return found[0] if parts else {}
        shares = torch.tensor([share for _, share in parts], device=self.device)
        of_parts = {name: torch.stack([metrics[name] for metrics in found]) for name in found[0]}
        return {
            name: values.max() if name == "ratio_error" else (values * shares.to(values.dtype)).sum()
            for name, values in of_parts.items()
        }

    def has_finite_gradient(self, batch: TensorDictBase) -> bool:
        """Return whether a minibatch of this rank alone has a finite gradient."""
        self.loss.standardize = None  # the other ranks do not take part
        self.optimizer.zero_grad()
        self.backward(batch)
        return all(bool(p.grad.isfinite().all()) for p in self.parameters if p.grad is not None)

    def _parts(self, batch: TensorDictBase | None) -> list[tuple[TensorDictBase, float]]:
        """Split a minibatch into parts of whole rows. Return each with its share of the trained steps."""
        if batch is None:
            return []
        limit = self.config.micro_batch_steps
        if limit is None or batch.numel() <= limit or not self.loss.is_mean_over_steps:
            return [(batch, 1.0)]
        max_rows = max(1, limit // (batch.numel() // len(batch)))
        num_parts = ceil_div(len(batch), max_rows)
        parts = batch.split(ceil_div(len(batch), num_parts))  # parts of similar sizes
        num_trained = [_num_trained(part) for part in parts]
        total = sum(num_trained)
        return [(part, number / total) for part, number in zip(parts, num_trained, strict=True) if number]

    def _average_over_ranks(self, metrics: dict[str, Tensor], batch: TensorDictBase | None) -> dict[str, Tensor]:
        """Replace gradients by their means over all ranks, and return the means of the metrics, in one message.

        Return the metrics as they are if no rank has trained steps. The gradients are then unchanged.
        """
        if self.ranks.size == 1:
            return metrics
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        # Before averaging: only the rank at fault reports it.
        check_finite_step({**metrics, "grad_norm": nn.utils.get_total_norm(gradients)})
        if batch is None and self.loss.normalize_advantage:
            self.ranks.standardized(torch.zeros(0))  # the loss of the other ranks calls it too
        # A rank without a minibatch sends zeros under the names of its last metrics, with no weight.
        self._metric_names = sorted(set(metrics) - {"ratio_error"}) or self._metric_names
        zero = torch.zeros((), device=self.device)
        scalars = [metrics.get(name, zero) for name in self._metric_names]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        weight = 0.0 if batch is None else _num_trained(batch)
        means = self.ranks.weighted_means([*gradients, *scalars], weight)
        if means is None:
            return metrics
        for parameter, gradient in zip(self.parameters, means, strict=False):
            parameter.grad = gradient
        return metrics | dict(zip(self._metric_names, means[len(self.parameters) :], strict=True))


def check_finite_step(metrics: dict[str, Tensor]) -> None:
    """Raise NonFiniteError for a gradient that is not finite; it names the loss that is not finite, if there is one."""
    grad_norm = metrics["grad_norm"]
    if math.isfinite(grad_norm):
        return
    for name, value in metrics.items():
        if name.startswith("loss_") and not math.isfinite(value):
            raise NonFiniteError(name, float(value))
    raise NonFiniteError("gradient", float(grad_norm))


def _is_logged(name: str) -> bool:
    return name in LOGGED or "memory_" in name


def _num_trained(batch: TensorDictBase) -> float:
    """Return the number of steps of a minibatch that have a loss."""
    mask = batch.get(keys.TRAIN_MASK, None)
    return float(batch.numel() if mask is None else mask.sum())
