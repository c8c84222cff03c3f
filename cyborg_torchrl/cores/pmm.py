"""`pmm`: the Predictive Memory Module, an external memory of slots."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cyborg_torchrl.cores.abstract import Core, InitialState, State, Terms, restart
from cyborg_torchrl.cores.resets import reset_steps
from cyborg_torchrl.cores.stack import StackCore
from cyborg_torchrl.registry import register_backbone, register_memory, with_options_of

EPS = 1e-6
MIN_WEIGHT = 1e-4


class Addressing(NamedTuple):
    """The slots that one step reads and writes."""

    read: Tensor
    """[B, R, S], a distribution over the slots for each read head."""
    write: Tensor
    """[B, S], multiplied by the gate."""
    gate: Tensor
    """[B, 1], in (0, 1)."""
    error: Tensor | None
    """Surprise, [B]; None without prediction."""


class PMMCore(Core):
    """Memory slots with content-based reads, gated writes with erasure, and a prediction of the next input.

    M [S, C] are the slots, cos is the cosine similarity, and k, s, v, e, g, m are computed from the input x_t:

        read       w_r = softmax_S(s_r cos(k_r, M_{t-1})),  r_t = (w_1 M_{t-1}, ..., w_R M_{t-1})
        surprise   d_t = mean((x_t - p_{t-1})^2),  p_t = W_p (r_t, x_t)
        write      g_t = sigmoid(g(x_t) + kappa d_t),  w = g_t (m alloc(U_{t-1}) + (1 - m) softmax_S(s_w cos(k_w, M)))
                   M_t = M_{t-1} (1 - w e^T) + w v^T
        usage      U_t = (1 - 1 / (10 max_horizon)) (U_{t-1} + w - U_{t-1} w)
        output     y_t = W_o r_t

    alloc(U) selects the least used slot. The initial memory has a random vector per slot, so that content addressing
    can tell slots apart. It can be learned. The prediction target is the next input. It gets no gradient, so inputs
    are not trained to be predictable.

    There are two regularisers: the prediction error, and the squared relative distance of the mean write rate from
    its target. Both are logged with the other `terms`.

    State: `memory` [B, S, C], `usage` [B, S], and `prediction` [B, F] if predictive.

    Args:
        in_features: F, features of the input.
        hidden_size: D, features of the output. None: F.
        slots: S, number of slots.
        slot_size: C, numbers in a slot.
        num_heads: R, number of read heads.
        max_horizon: steps that memory should bridge. Usage decays over ten times as many.
        predictive: predict the next input. Otherwise the write gate depends on the input alone.
        write_rate: target of the mean write gate.
        write_rate_coef: weight of its regulariser.
        prediction_coef: weight of the prediction error.
        learn_initial_state: train the initial memory.

    Source: content addressing, erase and add are from Graves et al. (2014), "Neural Turing Machines". Allocation by
    usage is from Graves et al. (2016), "Hybrid computing using a neural network with dynamic external memory". The
    surprise at the gate and the write-rate target are ours.
    """

    def __init__(
        self,
        in_features: int,
        *,
        hidden_size: int | None = None,
        slots: int = 16,
        slot_size: int = 32,
        num_heads: int = 2,
        max_horizon: int = 1000,
        predictive: bool = True,
        write_rate: float = 0.1,
        write_rate_coef: float = 0.1,
        prediction_coef: float = 0.1,
        learn_initial_state: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("slots", slots), ("slot_size", slot_size), ("num_heads", num_heads)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}.")
        if not 0.0 < write_rate < 1.0:
            raise ValueError(f"write_rate must lie in (0, 1); got {write_rate}.")
        self.in_features, self.out_features = in_features, hidden_size or in_features
        self.slots, self.num_heads, self.is_predictive = slots, num_heads, predictive
        self.write_rate, self.write_rate_coef, self.prediction_coef = write_rate, write_rate_coef, prediction_coef
        self.usage_kept = 1.0 - 0.1 / max_horizon
        self.term_names = ("write_rate", "read_entropy", "slot_variance", "usage")
        self.state_shapes = {"memory": (slots, slot_size), "usage": (slots,)}
        if predictive:
            self.state_shapes["prediction"] = (in_features,)
            self.term_names = (*self.term_names, "prediction_error")
        memory = {"memory": torch.randn(slots, slot_size) * slot_size**-0.5}
        self.initial_memory = InitialState({"memory": (slots, slot_size)}, learn_initial_state, start=memory)
        self.initial_rest = InitialState({k: v for k, v in self.state_shapes.items() if k != "memory"})
        # Keys and values have no bias, so a blank step reads and writes nothing.
        self.parts = (num_heads * slot_size, slot_size, slot_size)
        self.keys = nn.Linear(in_features, sum(self.parts), bias=False)
        self.gate_parts = (num_heads, 1, 1, 1, slot_size)
        self.gates = nn.Linear(in_features, sum(self.gate_parts))
        self.output = nn.Linear(num_heads * slot_size, self.out_features, bias=False)
        with torch.no_grad():
            strength, _, write, mix, erase = self.gates.bias.split(self.gate_parts)
            strength.fill_(math.log(math.expm1(4.0)))
            write.fill_(math.log(write_rate / (1.0 - write_rate)))
            mix.fill_(3.0)  # write to unused slots at first: untrained content addressing would fill only a few slots
            erase.fill_(2.0)
        if predictive:
            self.predict_from_read = nn.Linear(num_heads * slot_size, in_features, bias=False)
            self.predict_from_input = nn.Linear(in_features, in_features)
            self.surprise_weight = nn.Parameter(torch.tensor(math.log(math.expm1(1.0))))

    def initial_state(self, batch: int) -> State:
        """Return {"memory": [batch, S, C], "usage": [batch, S], "prediction": [batch, F]}."""
        return self.initial_memory(batch) | self.initial_rest(batch)

    def step(self, x: Float[Tensor, "B F"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """Take one step."""
        read, state, _ = self._advance(x, self._project(x), state, has_terms=False)
        return self.output(read), state

    def forward(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State]:
        """Run a sequence."""
        y, state, _ = self._unroll(x, state, is_init, has_terms=False)
        return y, state

    def forward_with_terms(
        self, x: Float[Tensor, "B T F"], state: State, is_init: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], State, Terms]:
        """Run a sequence, and return the terms of each step too."""
        return self._unroll(x, state, is_init, has_terms=True)

    def addressing(self, x: Float[Tensor, "B F"], state: State) -> Addressing:
        """Return the slots that `step` would read and write."""
        return self._address(x, self._project(x), state, state["usage"].clamp(0.0, 1.0))

    def regularize(self, terms: Terms) -> dict[str, Tensor]:
        """Return the weighted losses of the write rate and the prediction."""
        distance = terms["write_rate"].mean() / self.write_rate - 1.0
        losses = {"write_rate": self.write_rate_coef * distance.square()}
        if self.is_predictive:
            losses["prediction"] = self.prediction_coef * terms["prediction_error"].mean()
        return losses

    def _unroll(self, x: Tensor, state: State, is_init: Tensor, *, has_terms: bool) -> tuple[Tensor, State, Terms]:
        initial = self.initial_state(x.shape[0])
        # Values that depend on the input alone are computed for all steps at once.
        projected = zip(*(part.unbind(1) for part in self._project(x)), strict=True)
        flags, resets = is_init.unbind(1), reset_steps(is_init.t())
        reads: list[Tensor] = []
        rows: list[Terms] = []
        for t, (x_t, projected_t) in enumerate(zip(x.unbind(1), projected, strict=True)):
            if resets[t]:
                state = restart(state, initial, flags[t])
            read_t, state, terms_t = self._advance(x_t, projected_t, state, has_terms=has_terms)
            reads.append(read_t)
            rows.append(terms_t)
        terms = {name: torch.stack([row[name] for row in rows], 1) for name in rows[0]}
        return self.output(torch.stack(reads, 1)), state, terms

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        read_keys, write_key, value = self.keys(x).split(self.parts, -1)
        read_strength, write_strength, write, mix, erase = self.gates(x).split(self.gate_parts, -1)
        heads = read_keys.unflatten(-1, (self.num_heads, -1))
        keys = torch.cat([heads, write_key.unsqueeze(-2)], -2)
        strength = F.softplus(torch.cat([read_strength, write_strength], -1)).unsqueeze(-1)
        parts = (strength * _unit(keys), value, write, torch.sigmoid(mix), torch.sigmoid(erase))
        return (*parts, self.predict_from_input(x)) if self.is_predictive else parts

    def _advance(
        self, x: Tensor, projected: tuple[Tensor, ...], state: State, *, has_terms: bool
    ) -> tuple[Tensor, State, Terms]:
        _, value, _, _, erase, *prediction_of_input = projected
        memory, usage = state["memory"], state["usage"].clamp(0.0, 1.0)
        read_weights, where, gate, error = self._address(x, projected, state, usage)
        read = torch.matmul(read_weights, memory).flatten(1)
        next_state: State = {}
        if self.is_predictive:
            next_state["prediction"] = self.predict_from_read(read) + prediction_of_input[0]
        where_column = where.unsqueeze(-1)
        erased = torch.addcmul(memory, where_column * memory, erase.unsqueeze(1), value=-1.0)
        next_state["memory"] = torch.addcmul(erased, where_column, value.unsqueeze(1))
        next_state["usage"] = self.usage_kept * torch.addcmul(usage + where, usage, where, value=-1.0)
        if not has_terms:
            return read, next_state, {}
        return read, next_state, self._terms(gate, read_weights, next_state, error)

    def _address(self, x: Tensor, projected: tuple[Tensor, ...], state: State, usage: Tensor) -> Addressing:
        keys, _, write, mix, *_ = projected
        weights = torch.softmax(torch.matmul(keys, _unit(state["memory"]).transpose(1, 2)), -1)
        error: Tensor | None = None
        if self.is_predictive:
            error = (x.detach() - state["prediction"]).square().mean(-1)
            write = write + F.softplus(self.surprise_weight) * error.unsqueeze(-1)
        gate = torch.sigmoid(write)
        where = gate * torch.lerp(weights[:, -1], _allocate(usage), mix)
        return Addressing(weights[:, :-1], where, gate, error)

    def _terms(self, gate: Tensor, read_weights: Tensor, state: State, error: Tensor | None) -> Terms:
        entropy = torch.special.entr(read_weights.detach()).sum(-1).mean(-1) / math.log(max(2, self.slots))
        terms = {
            "write_rate": gate.squeeze(-1),
            "read_entropy": entropy,
            "slot_variance": state["memory"].detach().var(1, correction=0).mean(-1),
            "usage": state["usage"].detach().mean(-1),
        }
        return terms if error is None else terms | {"prediction_error": error}


def _unit(x: Tensor) -> Tensor:
    """Return vectors of length one. A zero vector stays zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


def _allocate(usage: Float[Tensor, "B S"]) -> Float[Tensor, "B S"]:
    """Return weights of the least used slots: 1 - usage, times the usage of all less used slots.

    Weights below `MIN_WEIGHT` become zero. So slots with the same history stay equal and are used in their order.
    Without this limit, unused slots would have weights 1, 1e-3, 1e-6, ..., and rounding would choose the next slot.

    Source: Graves et al. (2016), equation (1) of the methods.
    """
    ascending, order = torch.sort(usage, dim=-1, stable=True)
    used_less = torch.cumprod(F.pad(ascending[:, :-1], (1, 0), value=1.0), -1)
    weight = (1.0 - ascending) * used_less
    return torch.zeros_like(usage).scatter(-1, order, torch.where(weight < MIN_WEIGHT, 0.0, weight))


@register_backbone("pmm")
@with_options_of(PMMCore)
def build_pmm(in_features: int, *, hidden_size: int = 64, max_horizon: int | None = None, **options: Any) -> PMMCore:
    """Build a `PMMCore` as a backbone. The class describes the options."""
    return PMMCore(in_features, hidden_size=hidden_size, max_horizon=max_horizon or 1000, **options)


@register_memory("pmm")
@with_options_of(PMMCore, without=["hidden_size"])
def augment_with_pmm(core: Core, *, max_horizon: int | None = None, **options: Any) -> StackCore:
    """Stack an external memory on a core, which becomes its controller. `PMMCore` describes the options.

    The core can combine inputs of different steps, and the slots store the result. Both read-outs are added.
    """
    width = core.in_features
    memory = PMMCore(width, max_horizon=max_horizon or 1000, **options)
    return StackCore([core, memory], width, width)


@register_memory("none")
def leave_as_it_is(core: Core) -> Core:
    """Return the backbone without an external memory."""
    return core
