"""Padding: do the steps that only fill up a batch change the update?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cyborg_torchrl.checks.findings import Finding, judge, skip
from cyborg_torchrl.checks.nested import Tree, as_tensor, leaves_of, map_leaves
from cyborg_torchrl.checks.probe import TINY

PADDING = "padding"
LIMIT = 1e-5


def check_padding(update: Callable[[Tree], Tree], batch: Tree, is_padding: Any, *, seed: int = 0) -> Finding:
    """Check that other numbers in the padded steps of a batch change nothing in the update.

    Args:
        update: takes a batch and returns arrays that an update depends on, such as the loss and its gradients. It must
            give the same result if it is called twice with the same batch.
        batch: arrays, nested in any way. The padded steps are changed in arrays of shape [N, T, ...]. Keep the mask of
            the trained steps out of the batch, since it has this shape too.
        is_padding: true for the padded steps, [N, T] bool.
        seed: seed of the other numbers.

    Returns:
        The finding; its value is the largest relative change of a returned array.
    """
    mask = as_tensor(is_padding).bool()
    generator = torch.Generator().manual_seed(seed)

    def other(array: Any) -> Any:
        tensor = as_tensor(array)
        if tensor.shape[: mask.ndim] != mask.shape:
            return array
        changed = torch.where(
            mask.view(*mask.shape, *(1,) * (tensor.ndim - mask.ndim)), _other(tensor, generator), tensor
        )
        return changed if isinstance(array, Tensor) else changed.numpy()

    if not bool(mask.any()):
        return skip(PADDING, "The batch holds no padding.")
    before = [as_tensor(leaf).detach().clone() for leaf in leaves_of(update(batch))]
    again = [as_tensor(leaf).detach().clone() for leaf in leaves_of(update(batch))]
    if _change(before, again) > LIMIT:
        return skip(PADDING, "The update differs when it is repeated, so nothing can be compared.")
    trained = [as_tensor(leaf).detach() for leaf in leaves_of(update(map_leaves(other, batch)))]
    return judge(
        PADDING,
        _change(before, trained),
        LIMIT,
        passed="Padded steps change nothing in the update.",
        failed="Padded steps change the update: they are trained, or they count in a mean.",
        cure="Apply the mask before each mean, in the loss and in the normalisation of advantages.",
    )


def _other(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return noise for floats, and other valid entries of the tensor for the rest."""
    if tensor.is_floating_point():
        return tensor + torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
    return tensor.flatten()[torch.randint(tensor.numel(), tensor.shape, generator=generator)]


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    pairs = [(old.double(), new.double()) for old, new in zip(before, after, strict=True) if old.numel()]
    changes = [float((old - new).abs().max() / old.abs().max().clamp_min(TINY)) for old, new in pairs]
    return max(changes, default=0.0)
