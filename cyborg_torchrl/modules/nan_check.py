"""Finds the first number that is not finite, and says where it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor


class NonFiniteError(RuntimeError):
    """NaN or infinity where training cannot go on; the message names entry, environment and step.

    Args:
        key: the entry.
        value: what was found.
        environment: its number in the batch; None if it is not known.
        step: of the rollout; None if it is not known.
        record: what there is to look into, for a dump: tensors, numbers, texts, dicts.
        hint: what may be the cause.
    """

    def __init__(
        self,
        key: NestedKey,
        value: float,
        environment: int | None = None,
        step: int | None = None,
        record: dict[str, Any] | None = None,
        hint: str = "",
    ) -> None:
        name = key if isinstance(key, str) else "/".join(map(str, key))
        where = "" if environment is None else f" in environment {environment}"
        when = "" if step is None else f" at step {step} of the rollout"
        super().__init__(f"'{name}' is {value}{where}{when}{hint and f': {hint}'}")
        self.key, self.value, self.environment, self.step = name, value, environment, step
        self.record = {**(record or {}), "key": name, "environment": environment, "step": step}


def check_finite(steps: TensorDictBase, entries: Sequence[NestedKey], *, is_rollout: bool = True) -> None:
    """Refuses steps [N, T] with entries that are not finite.

    Args:
        steps: of a rollout.
        entries: what is looked at, causes before consequences; what is not there, or no float, is passed over.
        is_rollout: False: the steps are those of the present, [N, 1], and have no number.

    Raises:
        NonFiniteError: for the earliest step; of its entries, for the first.
    """
    found: list[tuple[int, int, int, NestedKey, Tensor]] = []
    for rank, key in enumerate(entries):
        value = steps.get(key, None)
        if not isinstance(value, Tensor) or not value.is_floating_point() or _is_finite(value):
            continue
        bad = ~value.isfinite()
        per_step = bad.reshape(*bad.shape[:2], -1).any(-1)
        step = int(per_step.any(0).nonzero()[0])
        environment = int(per_step[:, step].nonzero()[0])
        found.append((step, rank, environment, key, value[environment, step][bad[environment, step]]))
    if not found:
        return
    step, _, environment, key, value = min(found, key=lambda item: item[:2])
    first = float(value.reshape(-1)[0])
    record = {"steps": steps[environment].detach().cpu().to_dict()}
    raise NonFiniteError(key, first, environment, step if is_rollout else None, record)


def _is_finite(value: Tensor) -> bool:
    """Whether all numbers are; by their sum, which is so where they are, unless it overflows."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def environment_of(rows: Tensor, rollout: Tensor) -> list[tuple[int, int]]:
    """Where sequences were cut out of a rollout.

    Args:
        rows: [B, L] figures of steps, no two of which are equal, such as log-probs.
        rollout: [N, T], the same.

    Returns:
        For each row the environment and the step that it begins with.
    """
    places: list[tuple[int, int]] = []
    for row in rows:
        matches = (rollout == row[0]).nonzero()
        best = max(matches.tolist(), key=lambda place: _agreement(row, rollout[place[0], place[1] :]))
        places.append((best[0], best[1]))
    return places


def _agreement(row: Tensor, steps: Tensor) -> int:
    length = min(len(row), len(steps))
    return int(torch.cumprod((row[:length] == steps[:length]).long(), 0).sum())
