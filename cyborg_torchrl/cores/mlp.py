"""`mlp`: a layer of a stack without memory."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cyborg_torchrl.cores.abstract import Core, State


class MLPBlock(Core):
    """A network of two linear maps on each step alone.

        y_t = W_out silu(W_in x_t)

    There are no biases, as in the other blocks, so a blank input stays blank. It has no state.

    Args:
        d_model: width of input and output.
        expand: width of the hidden layer / d_model.

    Raises:
        ValueError: if expand is below 1.
    """

    def __init__(self, d_model: int, *, expand: int = 2) -> None:
        super().__init__()
        if expand < 1:
            raise ValueError(f"expand must be >= 1; got {expand}.")
        self.in_features = self.out_features = d_model
        self.state_shapes: Mapping[str, tuple[int, ...]] = {}
        self.in_proj = nn.Linear(d_model, expand * d_model, bias=False)
        self.out_proj = nn.Linear(expand * d_model, d_model, bias=False)

    def initial_state(self, batch: int) -> State:
        """Return {}, because there is no memory."""
        del batch
        return {}

    def step(self, x: Float[Tensor, "B F"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Take one step."""
        del state
        return self.out_proj(F.silu(self.in_proj(x))), {}

    def forward(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """Run all steps at once, since each step is independent."""
        del state, is_init
        return self.out_proj(F.silu(self.in_proj(x))), {}
