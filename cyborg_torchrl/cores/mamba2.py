"""`mamba2`: the Mamba-2 block as a core with an explicit state."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cyborg_torchrl.cores.abstract import Core, InitialState, State
from cyborg_torchrl.cores.causal_conv import causal_conv, causal_conv_step
from cyborg_torchrl.cores.gated_readout import gated_readout, gated_readout_step
from cyborg_torchrl.cores.kernels.memory_read import read_memory
from cyborg_torchrl.cores.kernels.official_mamba import Kernel, ssd_scan_cuda
from cyborg_torchrl.cores.kernels.triton.selective_scan import ssd_scan_triton
from cyborg_torchrl.cores.ssd import ssd_scan
from cyborg_torchrl.cores.timescale import build_readout, rms_normalize, step_size_bias, step_sizes

SCANS = {"torch": ssd_scan, "triton": ssd_scan_triton, "cuda": ssd_scan_cuda}


class Mamba2Block(Core):
    """The Mamba-2 block (SSD) with an explicit state.

        z_t, (u_t, B_t, C_t), dt_t = W_in x_t;    u, B, C := silu(conv(u, B, C))
        delta_t = softplus(dt_t + b_dt),  one for each head of P channels
        h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t^T
        y_t = W_out norm((readout(h_t C_t) + D u_t) * silu(z_t))

    Parameters have the names and shapes of the official block with one group, so its weights load with `strict=True`.
    With `official=True` the block computes the same function. Otherwise it differs as `MambaBlock` does:

    - B and C are RMS-normalised.
    - Step sizes are log-uniform over the horizon and ordered by head. A starts at -1.
    - The read-out is normalised in groups of time-scales. It replaces `norm`, the RMSNorm of the official block.
    - D starts at 0, and the convolution has no bias.

    Heads are small, so that there are many time-scales.

    State: `mamba_conv` [B, d_inner + 2 d_state, d_conv], the last inputs of the convolution, and `mamba_ssm`
    [B, heads, P, d_state].

    Args:
        d_model: width of input and output.
        d_state: N, numbers that each channel keeps.
        d_conv: W, width of the convolution.
        expand: d_inner / d_model.
        headdim: P, channels of a head.
        max_horizon: steps that memory should bridge.
        readout: "timescale_norm" or "none".
        readout_groups: groups of the time-scale norm.
        official: compute the same as the official block: no added norms, trained biases, D starts at 1.
        learn_initial_state: make the initial state a parameter.
        kernel: "torch", "triton" (our kernel, on a GPU), "auto" (the faster of both), or "cuda" (mamba-ssm's kernel).
            Products of "cuda" are rounded to TF32: we measured differences between `forward` and `step` of 2e-3 of
            the largest output.

    Source: Dao and Gu (2024), "Transformers are SSMs".
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 8,
        max_horizon: int = 1000,
        readout: str = "timescale_norm",
        readout_groups: int = 16,
        official: bool = False,
        learn_initial_state: bool = False,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        d_inner = expand * d_model
        if d_inner % headdim:
            raise ValueError(f"headdim must divide d_inner = {d_inner}; got {headdim}.")
        heads, conv_channels = d_inner // headdim, d_inner + 2 * d_state
        self.in_features = self.out_features = d_model
        self.official, self.headdim = official, headdim
        self.parts = (d_inner, conv_channels, heads)
        self.conv_parts = (d_inner, d_state, d_state)
        self.state_shapes = {"mamba_conv": (conv_channels, d_conv), "mamba_ssm": (heads, headdim, d_state)}
        self.dt_bias = nn.Parameter(step_size_bias(heads, max_horizon))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.full((heads,), float(official)))
        self.in_proj = nn.Linear(d_model, sum(self.parts), bias=False)
        self.conv1d = nn.Conv1d(conv_channels, conv_channels, d_conv, groups=conv_channels, bias=official)
        self.norm = nn.RMSNorm(d_inner, eps=1e-5) if official else nn.Identity()
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        # a write with step size 1 is read as the product of B and C: a sum of N terms of size 1
        timescales = (1.0 / (d_state * step_sizes(heads, max_horizon))).repeat_interleave(headdim)
        self.readout = build_readout("none" if official else readout, d_inner, readout_groups, timescales)
        self.initial = InitialState(self.state_shapes, learn_initial_state)
        self.kernel = Kernel(kernel, SCANS, is_cuda_exact=False)
        # This matrix repeats a head's number for its channels. Broadcasting over rows of 8 numbers is far slower.
        self.spread: Tensor
        self.register_buffer("spread", torch.eye(heads).repeat_interleave(headdim, 1), persistent=False)

    def initial_state(self, batch: int) -> State:
        """Return {"mamba_conv": [batch, channels, d_conv], "mamba_ssm": [batch, heads, P, d_state]}."""
        return self.initial(batch)

    def step(self, x: Float[Tensor, "B F"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Take one step."""
        z, xbc, dt = self.in_proj(x).split(self.parts, -1)
        xbc, conv = causal_conv_step(xbc, *self._conv_parameters(), state["mamba_conv"])
        u, b, c, delta, a = self._select(xbc, dt)
        if self.kernel.choose(x.device, x.dtype) == "triton":  # the code of `forward`, so both round alike
            is_init, ssm = torch.zeros(1, x.shape[0], dtype=torch.bool, device=x.device), state["mamba_ssm"]
            u_1, delta_1, b_1, c_1 = (row.unsqueeze(0) for row in (u, delta, b, c))
            heads = u_1.unflatten(-1, (-1, self.headdim))
            y, ssm = ssd_scan_triton(heads, delta_1, a, b_1, c_1, ssm, is_init, ssm)
            return self._emit(y.flatten(-2).squeeze(0), u, z), {"mamba_conv": conv, "mamba_ssm": ssm}
        drive = (u * torch.matmul(delta, self.spread)).view(*delta.shape, self.headdim, 1) * b[:, None, None]
        ssm = torch.addcmul(drive, torch.exp(delta * a)[..., None, None], state["mamba_ssm"])
        y = read_memory(ssm.flatten(1, 2), c)
        return self._emit(y, u, z), {"mamba_conv": conv, "mamba_ssm": ssm}

    def forward(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """Run a sequence."""
        x, is_init = x.transpose(0, 1).contiguous(), is_init.transpose(0, 1).contiguous()
        initial = self.initial_state(x.shape[1])
        # Split the weight, not the product: each part is contiguous, and backward joins no gradients.
        z, xbc, dt = (F.linear(x, weight) for weight in self.in_proj.weight.split(self.parts))
        xbc, conv = causal_conv(xbc, *self._conv_parameters(), state["mamba_conv"], is_init, initial["mamba_conv"])
        u, b, c, delta, a = self._select(xbc, dt)
        heads = u.unflatten(-1, (-1, self.headdim))
        y, ssm = self.kernel.scan_for(x)(heads, delta, a, b, c, state["mamba_ssm"], is_init, initial["mamba_ssm"])
        y = gated_readout(y.flatten(-2), u, z, torch.matmul(self.D, self.spread), self.readout)
        return self.out_proj(self.norm(y)).transpose(0, 1), {"mamba_conv": conv, "mamba_ssm": ssm}

    def _conv_parameters(self) -> tuple[Tensor, Tensor | None]:
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def _select(self, xbc: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the input u [..., H P], B and C [..., N], the step sizes [..., H] and the state matrix A [H]."""
        u, b, c = xbc.split(self.conv_parts, -1)
        if not self.official:
            b, c = rms_normalize(b), rms_normalize(c)
        return u, b, c, F.softplus(dt + self.dt_bias), -torch.exp(self.A_log)

    def _emit(self, y: Tensor, u: Tensor, z: Tensor) -> Tensor:
        return self.out_proj(self.norm(gated_readout_step(y, u, z, torch.matmul(self.D, self.spread), self.readout)))
