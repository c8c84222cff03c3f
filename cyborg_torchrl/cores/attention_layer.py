"""One layer of attention, without its cache: projections, positions and gates."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from cyborg_torchrl.cores.timescale import rms_normalize


class GRUGate(nn.Module):
    """The gate of GTrXL, which replaces a residual.

    r = sigmoid(W_r y + U_r x);    z = sigmoid(W_z y + U_z x - 2);    n = tanh(W_n y + U_n (r x));
    (1 - z) x + z n
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.new, self.old = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 2 * width)
        self.candidate = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.old.bias[:width], self.old.bias[width:] = 0.0, -2.0  # at first the block is nearly skipped

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the gated sum of the input of a block and its output."""
        new_r, new_z, new_n = self.new(F.relu(y)).chunk(3, -1)
        old_r, old_z = self.old(x).chunk(2, -1)
        candidate = torch.tanh(new_n + self.candidate(torch.sigmoid(new_r + old_r) * x))
        return torch.lerp(x, candidate, torch.sigmoid(new_z + old_z))


class AttentionLayer(nn.Module):
    """Attention and two linear maps, each behind a norm.

        q, k = W norm(x + clock);    v = W_v norm(x)
        r_t = sum_s softmax_s(g q_t' . k_s' / sqrt(D) + bias(t - s)) v_s
        z = x + W_o r';    y = z + W_2 relu(W_1 norm(z))

    Here u' = u / sqrt(mean(u^2) + 1e-5), with the mean over the D numbers of a head, and g is trained. With normalised
    queries and keys, products stay small, and so do rounding errors of the softmax (Henry et al. 2020, "Query-key
    normalization for transformers"). A blank step (x = 0) has v = 0. Since r is normalised, a few steps with content
    are not lost in the mean over hundreds of blank ones.
    """

    def __init__(self, width: int, num_heads: int, window: int, position: str, gating: str) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.norms = nn.ModuleList([nn.LayerNorm(width, bias=False), nn.LayerNorm(width)])
        self.queries_keys, self.values = (nn.Linear(width, n * width, bias=False) for n in (2, 1))
        self.gain = nn.Parameter(torch.ones(width // num_heads))
        self.output = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.gates = nn.ModuleList([GRUGate(width), GRUGate(width)] if gating == "gru" else [])
        self.bias: Tensor
        """What is added to a product, by head and distance, [heads, window + 1]."""
        bias = torch.zeros(num_heads, window + 1)
        if position == "alibi":
            slopes = 2.0 ** (-8.0 * torch.arange(1, num_heads + 1) / num_heads)
            bias = -slopes.unsqueeze(1) * torch.arange(window + 1)
        if position == "relative":
            self.bias = nn.Parameter(bias)
        else:
            self.register_buffer("bias", bias, persistent=False)
        # Whole numbers of turns in a period, so that a position may be taken modulo the period, and stays exact.
        self.period = 8 * window
        turns = torch.logspace(math.log2(self.period / 4), 0.0, width // num_heads // 2, 2.0).round()
        self.turns: Tensor | None
        self.register_buffer("turns", turns if position == "rotary" else None, persistent=False)

    def project(
        self, x: Float[Tensor, "*B W"], clock: Float[Tensor, "*B W"] | None, age: Float[Tensor, " *B"]
    ) -> tuple[Tensor, ...]:
        """Return queries, keys and values, each [*B, heads, D]."""
        content = self.norms[0](x)
        place = content if clock is None else self.norms[0](x + clock)
        q, k = rms_normalize(self.queries_keys(place).unflatten(-1, (2, self.num_heads, -1))).unbind(-3)
        q = q * self.gain
        v = self.values(content).unflatten(-1, (self.num_heads, -1))
        if self.turns is not None:
            place = (age.remainder(self.period).unsqueeze(-1) * self.turns).remainder(self.period)
            angle = place.unsqueeze(-2) * (2.0 * math.pi / self.period)
            q, k = _rotate(q, angle), _rotate(k, angle)
        return q, k, v

    def finish(self, x: Float[Tensor, "*B W"], read: Float[Tensor, "*B H D"]) -> Tensor:
        """Return the output of the layer, [*B, W], given what attention has read."""
        x = self._join(0, x, self.output(rms_normalize(read).flatten(-2)))
        return self._join(1, x, self.mlp(self.norms[1](x)))

    def _join(self, i: int, x: Tensor, y: Tensor) -> Tensor:
        return self.gates[i](x, y) if self.gates else x + y


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
