"""The memoryless baseline: a core that restarts before every step."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Bool, Float
from torch import Tensor

from cyborg_torchrl.cores.abstract import Core, State


class MemorylessCore(Core):
    """A core that runs another core from its initial state at every step, in acting and in training.

    It has the parameters and the computation of the wrapped core, without memory and without a state to store. The
    setting `recurrent_mode: none` uses it.

    Args:
        core: the core to wrap.
    """

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core
        self.in_features, self.out_features = core.in_features, core.out_features
        self.state_shapes: Mapping[str, tuple[int, ...]] = {}

    def initial_state(self, batch: int) -> State:
        """Return {}, because there is no memory."""
        del batch
        return {}

    def step(self, x: Float[Tensor, "B F"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Take one step from the initial state of the wrapped core."""
        del state
        y, _ = self.core.step(x, self.core.initial_state(x.shape[0]))
        return y, {}

    def forward(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """Run all steps in one batch, since each step is independent."""
        del is_init
        y, state = self.step(x.flatten(0, 1), state)
        return y.unflatten(0, x.shape[:2]), state
