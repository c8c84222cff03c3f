"""`mamba`: the Mamba-1 block as a core with an explicit state."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cyborg_torchrl.cores.abstract import Core, InitialState, State
from cyborg_torchrl.cores.causal_conv import causal_conv, causal_conv_step
from cyborg_torchrl.cores.gated_readout import gated_readout, gated_readout_step
from cyborg_torchrl.cores.kernels.official_mamba import Kernel, selective_scan_cuda
from cyborg_torchrl.cores.kernels.selective_scan import selective_scan_cpp
from cyborg_torchrl.cores.kernels.triton.selective_scan import selective_scan_triton
from cyborg_torchrl.cores.selective_scan import LOG2_E, selective_scan
from cyborg_torchrl.cores.timescale import build_readout, rms_normalize, step_size_bias, step_sizes

SCANS = {
    "torch": selective_scan,
    "cpp": selective_scan_cpp,
    "triton": selective_scan_triton,
    "cuda": selective_scan_cuda,
}


class MambaBlock(Core):
    """The Mamba-1 block with an explicit state.

        u_t, z_t = W_in x_t;    u_t := silu(conv(u)_t)
        dt_t, B_t, C_t = W_x u_t;    delta_t = softplus(W_dt dt_t + b_dt)
        h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t
        y_t = W_out ((readout(C_t h_t) + D u_t) * silu(z_t))

    Parameters have the names and shapes of the official block, so its weights load with `strict=True`. With
    `official=True` the block computes the same function. Otherwise it differs as follows:

    - dt, B and C are RMS-normalised, as in Jamba and Falcon-Mamba.
    - Step sizes are log-uniform from 0.1 / max_horizon to 0.3, and ordered by channel.
    - The read-out is normalised in groups of time-scales. The skip D u_t is added after the norm, and D starts at 0.
    - The convolution has no bias, so a blank step writes nothing.

    State: `mamba_conv` [B, d_inner, d_conv], the last inputs of the convolution, and `mamba_ssm` [B, d_inner, d_state].

    Args:
        d_model: width of input and output.
        d_state: N, numbers that each channel keeps.
        d_conv: W, width of the convolution.
        expand: d_inner / d_model.
        max_horizon: steps that memory should bridge.
        readout: "timescale_norm" or "none".
        readout_groups: groups of the time-scale norm.
        official: compute the same as the official block: no norms, trained biases, D starts at 1.
        learn_initial_state: make the initial state a parameter.
        kernel: "torch", "cpp" (the C++ scan, on a CPU), "triton" (our kernel, on a GPU), "cuda" (mamba-ssm's kernel) or
            "auto" (the fastest available).

    Source: Gu and Dao (2023), "Mamba". The norms are from Lieber et al. (2024), "Jamba".
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        max_horizon: int = 1000,
        readout: str = "timescale_norm",
        readout_groups: int = 16,
        official: bool = False,
        learn_initial_state: bool = False,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        d_inner, self.dt_rank, self.d_state = expand * d_model, math.ceil(d_model / 16), d_state
        self.in_features = self.out_features = d_model
        self.official = official
        self.state_shapes = {"mamba_conv": (d_inner, d_conv), "mamba_ssm": (d_inner, d_state)}
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, bias=official)
        self.x_proj = nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.full((d_inner,), float(official)))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        # a write with step size 1 is read as the product of B and C: a sum of N terms of size 1
        timescales = 1.0 / (d_state * step_sizes(d_inner, max_horizon))
        self.readout = build_readout("none" if official else readout, d_inner, readout_groups, timescales)
        self.initial = InitialState(self.state_shapes, learn_initial_state)
        self.kernel = Kernel(kernel, SCANS)
        with torch.no_grad():
            bound = self.dt_rank**-0.5
            self.dt_proj.weight.uniform_(-bound, bound)
            self.dt_proj.bias.copy_(step_size_bias(d_inner, max_horizon))

    def initial_state(self, batch: int) -> State:
        """Return {"mamba_conv": [batch, d_inner, d_conv], "mamba_ssm": [batch, d_inner, d_state]}."""
        return self.initial(batch)

    def step(self, x: Float[Tensor, "B F"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Take one step."""
        u, z = self.in_proj(x).chunk(2, -1)
        u, conv = causal_conv_step(u, *self._conv_parameters(), state["mamba_conv"])
        delta, b, c = self._select(u)
        kernel = self.kernel.choose(x.device, x.dtype)
        if kernel in ("cpp", "triton"):  # the code of `forward`, so both round alike
            is_init, ssm = torch.zeros(1, x.shape[0], dtype=torch.bool, device=x.device), state["mamba_ssm"]
            u_1, delta_1, b_1, c_1 = (row.unsqueeze(0) for row in (u, delta, b, c))
            y, ssm = SCANS[kernel](u_1, delta_1, -torch.exp(self.A_log), b_1, c_1, ssm, is_init, ssm)
            return self._emit(y.squeeze(0), u, z), {"mamba_conv": conv, "mamba_ssm": ssm}
        # [B, N, D] in memory, with the operations of the scan in the same order: both round alike.
        decay = torch.exp2(delta.unsqueeze(1) * (-torch.exp(self.A_log).t() * LOG2_E))
        drive = (delta * u).unsqueeze(1) * b.unsqueeze(2)
        ssm = torch.addcmul(drive, decay, state["mamba_ssm"].transpose(1, 2))
        y = (ssm * c.unsqueeze(2)).sum(1)
        ssm = ssm.transpose(1, 2)
        return self._emit(y, u, z), {"mamba_conv": conv, "mamba_ssm": ssm}

    def forward(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """Run a sequence."""
        x, is_init = x.transpose(0, 1).contiguous(), is_init.transpose(0, 1).contiguous()
        initial = self.initial_state(x.shape[1])
        # Split the weight, not the product: each part is contiguous, and backward joins no gradients.
        u, z = (F.linear(x, weight) for weight in self.in_proj.weight.chunk(2))
        u, conv = causal_conv(u, *self._conv_parameters(), state["mamba_conv"], is_init, initial["mamba_conv"])
        delta, b, c = self._select(u)
        y, ssm = self.kernel.scan_for(x)(
            u, delta, -torch.exp(self.A_log), b, c, state["mamba_ssm"], is_init, initial["mamba_ssm"]
        )
        y = self.out_proj(gated_readout(y, u, z, self.D, self.readout))
        return y.transpose(0, 1), {"mamba_conv": conv, "mamba_ssm": ssm}

    def _conv_parameters(self) -> tuple[Tensor, Tensor | None]:
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the step sizes delta [..., d_inner], the write vector B and the read vector C [..., N]."""
        dt, b, c = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        if not self.official:
            dt, b, c = 2.0 * rms_normalize(dt), rms_normalize(b), rms_normalize(c)
        return F.softplus(self.dt_proj(dt)), b, c

    def _emit(self, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(gated_readout_step(y, u, z, self.D, self.readout))
