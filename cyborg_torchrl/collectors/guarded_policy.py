"""A policy for TorchRL's collectors that reports numbers which are not finite only after the rollout."""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from cyborg_torchrl.modules.nan_check import NonFiniteError


class GuardedPolicy(TensorDictModuleBase):
    """A policy that acts on zeros where it would refuse an observation that is not finite.

    An error in the middle of TorchRL's rollout could not name the step, and it would end a worker process without a
    message. The observation stays as it is, so the check of the whole rollout names entry, environment and step.

    Args:
        policy: raises `NonFiniteError`, as `PPOAgent` does.
    """

    def __init__(self, policy: TensorDictModuleBase) -> None:
        super().__init__()
        self.policy = policy
        self.in_keys, self.out_keys = list(policy.in_keys), list(policy.out_keys)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Act.

        Raises:
            NonFiniteError: if the policy itself makes numbers that are not finite.
        """
        try:
            return self.policy(tensordict)
        except NonFiniteError:
            cleaned = tensordict.select(*self.in_keys, strict=False).apply(_finite)
            assert cleaned is not None
            return tensordict.update(self.policy(cleaned).select(*self.out_keys, strict=False))


def _finite(value: Tensor) -> Tensor:
    return value.nan_to_num(0.0, 0.0, 0.0) if value.is_floating_point() else value
