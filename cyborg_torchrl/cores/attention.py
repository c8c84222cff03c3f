"""`attention`: causal attention over the last steps of an episode, with a cache as its memory state."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cyborg_torchrl.cores.abstract import Core, InitialState, State
from cyborg_torchrl.cores.attention_layer import AttentionLayer
from cyborg_torchrl.cores.kernels.native import is_native
from cyborg_torchrl.cores.kernels.sliding_cache import SlidingCache
from cyborg_torchrl.cores.kernels.window_attention import attend_sequence, layer_step
from cyborg_torchrl.registry import check_known, register_backbone

DEFAULT_WINDOW = 128
BLOCK = 64
"""Queries that are computed at once without C++."""
DIGITS = (1.0, 256.0, 65536.0)
"""Values of the digits in which steps are counted: bfloat16 holds each digit exactly."""


class AttentionCore(Core):
    """Layers of causal attention over the last `window` steps, and no further than the episode's start.

    The input is mapped to the width of the layers, without bias. With `has_clock`, a map of the sines and cosines of
    the episode's step is added before queries and keys are computed, but not to the values. A sequence is computed in
    blocks, so its cost is linear in its length.

    State: for each layer i, `keys_i` [B, heads, D, window] and `values_i` [B, heads, window, D] of the last steps, the
    newest last, and zero where there was no step. `count` [B, 3], the steps of the episode so far, in digits of base
    256.

    Args:
        in_features: F, features of the input.
        hidden_size: width of the layers, a multiple of 2 * num_heads.
        window: steps back that a layer reaches, besides the present one. None: 128.
        num_layers: number of layers; together they reach num_layers * window steps back.
        num_heads: heads of a layer, with D = hidden_size / num_heads numbers each.
        position: "relative" (a trained bias for each head and distance), "rotary" or "alibi".
        has_clock: let queries and keys depend on the step of the episode.
        gating: "none" (residuals) or "gru" (the gates of GTrXL).

    Raises:
        ValueError: if a number is out of range, or an option is unknown.

    Source: Vaswani et al. (2017), "Attention is all you need". A cache as memory is from Dai et al. (2019),
    "Transformer-XL"; ours has one window for each step, and passes gradients within a sequence. Gates: Parisotto et al.
    (2020), "Stabilizing transformers for reinforcement learning". Positions: Su et al. (2021), "RoFormer", with angles
    rounded to whole turns in 8 windows; Press et al. (2022), "Train short, test long" (ALiBi).
    """

    def __init__(
        self,
        in_features: int,
        *,
        hidden_size: int = 64,
        window: int | None = None,
        num_layers: int = 1,
        num_heads: int = 4,
        position: str = "relative",
        has_clock: bool = True,
        gating: str = "none",
    ) -> None:
        super().__init__()
        window = DEFAULT_WINDOW if window is None else window
        for name, value in (("window", window), ("num_layers", num_layers), ("num_heads", num_heads)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}.")
        if hidden_size < 1 or hidden_size % (2 * num_heads):
            raise ValueError(f"hidden_size must be a multiple of 2 * num_heads = {2 * num_heads}; got {hidden_size}.")
        check_known("position", position, ("relative", "rotary", "alibi"))
        check_known("gating", gating, ("none", "gru"))
        self.in_features, self.out_features, self.window = in_features, hidden_size, window
        self.input = nn.Linear(in_features, hidden_size, bias=False)
        self.clock = nn.Linear(hidden_size, hidden_size, bias=False) if has_clock else None
        speeds = torch.logspace(0.0, -3.0, hidden_size // 2)
        self.speeds: Tensor
        self.register_buffer("speeds", speeds, persistent=False)
        self.digits: Tensor
        self.register_buffer("digits", torch.tensor(DIGITS), persistent=False)
        self.layers = nn.ModuleList(
            AttentionLayer(hidden_size, num_heads, window, position, gating) for _ in range(num_layers)
        )
        size = hidden_size // num_heads
        shapes: dict[str, tuple[int, ...]] = {"count": (3,)}
        self.counters = ("count",)
        for i in range(num_layers):
            shapes[f"keys_{i}"] = (num_heads, size, window)
            shapes[f"values_{i}"] = (num_heads, window, size)
        self.state_shapes = shapes
        self.initial = InitialState(shapes)
        self._sliding = [(SlidingCache(-1), SlidingCache(-2)) for _ in range(num_layers)]

    def initial_state(self, batch: int) -> State:
        """Return zeros: {"count": [batch, 3], "keys_i": [batch, heads, D, window], "values_i": ...}."""
        return self.initial(batch)

    def step(self, x: Float[Tensor, "B F"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Take one step. Without gradients on a CPU, a cache that the step before returned is not copied.

        So the states of several steps share memory. Do not write into them.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
            y, state = self(x.unsqueeze(1), state, torch.zeros(x.shape[0], 1, dtype=torch.bool, device=x.device))
            return y.squeeze(1), state
        age = self._number(state["count"]) + 1.0
        y, clock, last = self.input(x), self._clock(age), {"count": self._count(age)}
        for i, (layer, (keys, values)) in enumerate(zip(self.layers, self._sliding, strict=True)):
            k, v = keys.extend(state[f"keys_{i}"]), values.extend(state[f"values_{i}"])
            y = layer_step(layer, y, clock, age, k, v)  # pyright: ignore[reportArgumentType]
            last |= {f"keys_{i}": k[..., 1:], f"values_{i}": v[..., 1:, :]}
        return y, last

    def forward(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """Run a sequence."""
        index = torch.arange(-self.window, x.shape[1], device=x.device)  # of the cache and of the sequence
        start = torch.where(is_init, index[self.window :], -self.window)
        if x.shape[1] > 1:  # an exported step must not contain it
            start = start.cummax(1).values  # the present episode's first step
        count = self._number(state["count"]).unsqueeze(1)
        age = torch.where(start >= 0, -start, count) + index[self.window :] + 1.0
        is_past = ~is_init[:, :1, None, None]
        is_kept = (index[-self.window :] >= start[:, -1:]).unsqueeze(1).unsqueeze(1)
        y, clock, last = self.input(x), self._clock(age), {"count": self._count(age[:, -1])}
        for i, layer in enumerate(self.layers):
            q, k, v = layer.project(y, clock, age)  # pyright: ignore[reportCallIssue]
            k = torch.cat([torch.where(is_past, state[f"keys_{i}"], 0.0), k.permute(0, 2, 3, 1)], -1)
            v = torch.cat([torch.where(is_past, state[f"values_{i}"], 0.0), v.transpose(1, 2)], -2)
            read = attend(q.transpose(1, 2), k, v, layer.bias, age)  # pyright: ignore[reportArgumentType]
            y = layer.finish(y, read.transpose(1, 2))  # pyright: ignore[reportCallIssue]
            last[f"keys_{i}"] = torch.where(is_kept, k[..., -self.window :], 0.0)
            last[f"values_{i}"] = torch.where(is_kept.transpose(-1, -2), v[..., -self.window :, :], 0.0)
        return y, last

    def _clock(self, age: Tensor) -> Tensor | None:
        if self.clock is None:
            return None
        angle = age.unsqueeze(-1) * self.speeds
        return self.clock(torch.cat([angle.sin(), angle.cos()], -1))

    def _number(self, count: Float[Tensor, "B 3"]) -> Float[Tensor, " B"]:
        return (count @ self.digits).round().clamp_min(0.0)

    def _count(self, age: Float[Tensor, " B"]) -> Float[Tensor, "B 3"]:
        return age.unsqueeze(-1).div(self.digits, rounding_mode="floor").remainder(DIGITS[1])


def attend(
    q: Float[Tensor, "B H T D"],
    keys: Float[Tensor, "B H D K"],
    values: Float[Tensor, "B H K D"],
    bias: Float[Tensor, "H C"],
    age: Float[Tensor, "B T"],
) -> Float[Tensor, "B H T D"]:
    """Return what the queries of a sequence read, block by block.

    Args:
        q: queries.
        keys: keys of the `window` steps before the sequence and of its own steps: K = window + T.
        values: values.
        bias: added to the products, by distance, C = window + 1.
        age: steps of the episode so far, the present one included; earlier ones are left out.
    """
    if is_native(q) and q.dtype is keys.dtype and not torch.compiler.is_compiling():
        return attend_sequence(q, keys, values, bias, age)
    length, window = q.shape[2], bias.shape[-1] - 1
    block = min(BLOCK, length)
    rest = -length % block
    q, keys, values = F.pad(q, (0, 0, 0, rest)), F.pad(keys, (0, rest)), F.pad(values, (0, 0, 0, rest))
    index = torch.arange(window + block, device=q.device)
    distance = window + index[:block].unsqueeze(1) - index
    age = F.pad(age, (0, rest), value=1.0).view(q.shape[0], 1, -1, block, 1)
    is_unread = (distance < 0) | (distance > window) | (distance >= age)
    k = keys.unfold(3, window + block, block).transpose(2, 3)  # [B, H, blocks, D, window + block]
    v = values.unfold(2, window + block, block)
    products = q.unflatten(2, (-1, block)) @ k * q.shape[-1] ** -0.5 + bias[:, distance.clamp(0, window)].unsqueeze(1)
    weights = products.masked_fill(is_unread, -torch.inf).softmax(-1)
    return (weights @ v.transpose(-1, -2)).flatten(2, 3)[:, :, :length]


build_attention = register_backbone("attention")(AttentionCore)
"""Build the core of `backbone=attention`."""
