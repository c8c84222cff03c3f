# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# (tensordict's and torchrl's annotations are narrower than what they take)
"""TorchRL's wrapper of gymnasium environments, with seeds that wait for the next episode."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from torchrl.envs import GymWrapper


class SeededGymWrapper(GymWrapper):
    """`GymWrapper`, except that a seed is used at the next reset.

    TorchRL's resets at once, behind the back of whoever holds the last observation: a collector acts on it as if
    nothing had happened, and a reset of Minecraft takes long. A seed that is set again before the first step of the
    episode that it began leaves that episode's successors alone: none is played twice.
    """

    _waiting: int | None = None
    _begun_with: int | None = None

    def _set_seed(self, seed: int | None) -> None:
        self._waiting = seed

    def _reset(self, tensordict: TensorDictBase | None = None, **options: Any) -> TensorDictBase:
        if self._waiting is not None:
            options.setdefault("seed", self._waiting)
        self._begun_with, self._waiting = options.get("seed"), None
        return super()._reset(tensordict, **options)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        if self._waiting == self._begun_with:
            self._waiting = None
        self._begun_with = None
        return super()._step(tensordict)
