"""`gated_delta`: a matrix as memory, whose entries are overwritten by key (Gated DeltaNet)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cyborg_torchrl.cores.abstract import Core, InitialState, State
from cyborg_torchrl.cores.causal_conv import causal_conv, causal_conv_step
from cyborg_torchrl.cores.delta_rule import delta_rule, delta_rule_step
from cyborg_torchrl.cores.timescale import step_size_bias


class GatedDeltaBlock(Core):
    """A matrix for each head, which maps keys to values.

        q_t, k_t, v_t = silu(conv(W_qkv x)_t);    q_t, k_t := q_t / |q_t|, k_t / |k_t|
        beta_t = sigmoid(W_b x_t),    alpha_t = exp(-softplus(W_a x_t + b_a))
        S_t = alpha_t S_{t-1} + beta_t (v_t - alpha_t S_{t-1} k_t) k_t^T
        y_t = W_out (norm(S_t q_t) * silu(W_z x_t))

    With beta_t = 1 the old value of a key is replaced by the new one; other keys stay. The decays b_a start at time
    constants from 3 steps to ten horizons, one for each head.

    State: `delta_conv` [B, 3 D, d_conv], the last inputs of the convolution, and `delta` [B, heads, D / heads,
    D / heads], the matrices, from keys to values.

    Args:
        d_model: D, width of input and output, a multiple of num_heads.
        num_heads: number of matrices.
        d_conv: width of the convolution.
        max_horizon: steps that memory should bridge.
        learn_initial_state: make the initial state of the convolution a parameter. The matrices start at zero.

    Raises:
        ValueError: if num_heads does not divide d_model.

    Source: Yang et al. (2024), "Gated Delta Networks: improving Mamba2 with delta rule". We differ in the start of the
    decays, and q, k and v have the same size. The convolution has no bias, so a blank step writes nothing.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        d_conv: int = 4,
        max_horizon: int = 1000,
        learn_initial_state: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"num_heads must divide the width of {d_model}; got {num_heads}.")
        self.in_features = self.out_features = d_model
        self.num_heads, size = num_heads, d_model // num_heads
        self.state_shapes = {"delta_conv": (3 * d_model, d_conv), "delta": (num_heads, size, size)}
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.conv = nn.Conv1d(3 * d_model, 3 * d_model, d_conv, groups=3 * d_model, bias=False)
        self.gates = nn.Linear(d_model, 2 * num_heads, bias=False)
        self.decay_bias = nn.Parameter(step_size_bias(num_heads, max_horizon))
        self.norm = nn.RMSNorm(size, eps=1e-5)
        self.output_gate, self.output = nn.Linear(d_model, d_model, bias=False), nn.Linear(d_model, d_model, bias=False)
        self.initial_conv = InitialState({"delta_conv": self.state_shapes["delta_conv"]}, learn_initial_state)
        self.initial_matrix = InitialState({"delta": self.state_shapes["delta"]})

    def initial_state(self, batch: int) -> State:
        """Return {"delta_conv": [batch, 3 D, d_conv], "delta": [batch, heads, D / heads, D / heads]}."""
        return self.initial_conv(batch) | self.initial_matrix(batch)

    def step(self, x: Float[Tensor, "B F"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Take one step."""
        u, conv = causal_conv_step(self.qkv(x), self.conv.weight.squeeze(1), None, state["delta_conv"])
        read, matrix = delta_rule_step(*self._project(x, u), state["delta"])
        return self._emit(read, x), {"delta_conv": conv, "delta": matrix}

    def forward(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """Run a sequence."""
        u, conv = causal_conv(
            self.qkv(x).transpose(0, 1).contiguous(),
            self.conv.weight.squeeze(1),
            None,
            state["delta_conv"],
            is_init.t().contiguous(),
            self.initial_state(x.shape[0])["delta_conv"],
        )
        read, matrix = delta_rule(*self._project(x, u.transpose(0, 1)), state["delta"], is_init)
        return self._emit(read, x), {"delta_conv": conv, "delta": matrix}

    def _project(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return q, k and v [*B, heads, D / heads], beta and the logarithm of alpha [*B, heads]."""
        q, k, v = u.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        beta, decay = self.gates(x).chunk(2, -1)
        q, k = F.normalize(q, dim=-1, eps=1e-6), F.normalize(k, dim=-1, eps=1e-6)
        return q, k, v, torch.sigmoid(beta), -F.softplus(decay + self.decay_bias)

    def _emit(self, read: Tensor, x: Tensor) -> Tensor:
        return self.output(self.norm(read).flatten(-2) * F.silu(self.output_gate(x)))
