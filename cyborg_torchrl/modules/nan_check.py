"""Search for the first number that is not finite, and report its entry, environment and step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor


class NonFiniteError(RuntimeError):
    """NaN or infinity that stops training; the message names entry, environment and step.

    Args:
        key: the entry.
        value: the number that is not finite.
        environment: its index in the batch; None if unknown.
        step: the step of the rollout; None if unknown.
        record: content of a dump: tensors, numbers, texts, dicts.
        hint: a possible cause.
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

    def at_step(self, step: int) -> NonFiniteError:
        """Return the error with the step of the rollout, if it has none."""
        if self.step is not None:
            return self
        error = NonFiniteError(self.key, self.value, self.environment, step)
        error.record = self.record  # the steps before are not known, so there the step has no number
        return error


def check_finite(steps: TensorDictBase, entries: Sequence[NestedKey], *, is_rollout: bool = True) -> None:
    """Check that entries of steps [N, T] are finite.

    Args:
        steps: the steps of a rollout.
        entries: the entries to check, causes before consequences; missing entries and integers are skipped.
        is_rollout: False for the present step only, [N, 1], which has no number.

    Raises:
        NonFiniteError: for the earliest step, and for the first of its entries.
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
    """Return whether all numbers are finite. Their sum answers fast; only if it overflows each number is tested."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())
