"""`pseudo_mamba`: a diagonal gated state space cell without kernels, for small devices."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cyborg_torchrl.cores.abstract import Core, InitialState, State
from cyborg_torchrl.cores.gated_readout import gated_readout, gated_readout_step
from cyborg_torchrl.cores.scan import gated_linear_scan, gated_linear_step
from cyborg_torchrl.cores.timescale import build_readout, step_size_bias, step_sizes


class PseudoMambaBlock(Core):
    """Mamba reduced to one state number per channel, without the convolution, B and C.

        u_t, z_t, d_t = W_in x_t;    delta_t = softplus(d_t + b);    a_t = exp(-delta_t)
        h_t = a_t h_{t-1} + (1 - a_t) u_t
        y_t = W_out ((readout(h_t) + D u_t) * silu(z_t))

    Step sizes, time-scales and the read-out are the same as in `MambaBlock`. D starts at 0.

    State: `mamba_ssm` [B, d_inner].

    Args:
        d_model: width of input and output.
        expand: d_inner / d_model.
        max_horizon: steps that memory should bridge.
        readout: "timescale_norm" or "none".
        readout_groups: groups of the time-scale norm.
        learn_initial_state: make the initial state a parameter.

    Source: the selective decay and zero-order hold of Gu and Dao (2023). Their theorem 1 shows that such a cell is a
    gated recurrent unit. The output gate and the skip come from their block.
    """

    def __init__(
        self,
        d_model: int,
        *,
        expand: int = 2,
        max_horizon: int = 1000,
        readout: str = "timescale_norm",
        readout_groups: int = 16,
        learn_initial_state: bool = False,
    ) -> None:
        super().__init__()
        d_inner = expand * d_model
        self.in_features = self.out_features = d_model
        self.state_shapes = {"mamba_ssm": (d_inner,)}
        self.in_proj = nn.Linear(d_model, 3 * d_inner, bias=False)
        self.dt_bias = nn.Parameter(step_size_bias(d_inner, max_horizon))
        self.D = nn.Parameter(torch.zeros(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self.readout = build_readout(readout, d_inner, readout_groups, 1.0 / step_sizes(d_inner, max_horizon))
        self.initial = InitialState(self.state_shapes, learn_initial_state)

    def initial_state(self, batch: int) -> State:
        """Return {"mamba_ssm": [batch, d_inner]}."""
        return self.initial(batch)

    def step(self, x: Float[Tensor, "B F"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Take one step."""
        u, z, decay, drive = self._gates(x)
        hidden = gated_linear_step(decay, drive, state["mamba_ssm"])
        return self._emit(hidden, u, z), {"mamba_ssm": hidden}

    def forward(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """Run a sequence."""
        u, z, decay, drive = self._gates(x.transpose(0, 1).contiguous())
        initial = self.initial_state(x.shape[0])["mamba_ssm"]
        is_init = is_init.transpose(0, 1).contiguous()
        hidden = gated_linear_scan(decay, drive, state["mamba_ssm"], is_init, initial)
        y = self.out_proj(gated_readout(hidden, u, z, self.D, self.readout))
        return y.transpose(0, 1), {"mamba_ssm": hidden[-1]}

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u, z, dt = self.in_proj(x).chunk(3, -1)
        delta = F.softplus(dt + self.dt_bias)
        # expm1 keeps 1 - a exact where delta is tiny
        return u, z, torch.exp(-delta), -torch.expm1(-delta) * u

    def _emit(self, hidden: Tensor, u: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(gated_readout_step(hidden, u, z, self.D, self.readout))
