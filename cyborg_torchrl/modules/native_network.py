"""Encoder, memory, norms and heads as one C++ call: a step while acting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cyborg_torchrl.cores import LRULayer, LSTMLayer, RecurrentLayer, State, TimescaleNorm
from cyborg_torchrl.cores.linear import Derived
from cyborg_torchrl.cores.lru import side_by_side
from cyborg_torchrl.cores.lstm import bias_and_transposed
from cyborg_torchrl.cores.native import DTYPES, function, integers, pointers
from cyborg_torchrl.modules.fusion import PastPresentFusion

ROWS_PER_THREAD = 128
"""Fewer are done before another thread has begun."""
Slot = tuple[nn.Module, str, tuple[int, ...]]
"""Where a parameter is looked up, and its shape."""


class Acted(NamedTuple):
    """What comes of a step."""

    policy: Tensor
    """Of the policy head, [B, A]."""
    value: Tensor
    """[B, 1]."""
    state: State
    """The next memory state, {name: [B, 1, D]}."""


class NativeNetwork:
    """Networks that there is a C++ call for, and what it takes; see `NativeStep`.

    Parameters are looked up at each call; what derives from them is kept as `Derived` keeps it.

    Args:
        encoder: the map of the observation.
        layer: of the memory.
        norm: of its read-out.
        fusion: of past and present.
        heads: of policy and value.

    Raises:
        KeyError: if a parameter is not where it belongs.
        ValueError: if it has another shape: C++ would read on beyond the end.
    """

    def __init__(
        self,
        encoder: nn.Linear,
        layer: RecurrentLayer,
        norm: TimescaleNorm,
        fusion: PastPresentFusion,
        heads: Sequence[nn.Linear],
    ) -> None:
        memory, channels = MEMORIES[type(layer)], layer.features
        self._observed, self._channels, self._actions = encoder.in_features, channels, heads[0].out_features
        slots: list[Slot] = [(encoder, "weight", (channels, self._observed)), *memory.slots(layer)]
        slots += [(each, name, (channels,)) for each in (fusion.past, fusion.present) for name in ("weight", "bias")]
        for head, rows in zip(heads, (self._actions, 1), strict=True):
            slots += [(head, "weight", (rows, channels)), (head, "bias", (rows,))]
        self._slots = [(m._buffers if name in m._buffers else m._parameters, name) for m, name, _ in slots]
        shapes = [shape for _, _, shape in slots]
        if _shapes([tensors[name] for tensors, name in self._slots]) != shapes:
            raise ValueError(f"parameters of the shapes {shapes} are needed.")
        self._packed = Derived(partial(_packed, shapes, memory.derive))
        self._function, self._norm, self._fusion, self._names = memory.function, norm, fusion, layer.state_names
        mapped, group = min(self._observed, channels), channels // norm.groups
        self._sizes = integers(self._observed, mapped, channels, group, self._actions)

    def __call__(self, observation: Tensor, state: State) -> Acted | None:
        """Takes a step; None where sizes, types or devices are such that torch has to, or to refuse them.

        Args:
            observation: [B, O].
            state: before the step, restarted where an episode begins, {name: [B, 1, D]}.
        """
        packed = self._packed.of(*[tensors.get(name) for tensors, name in self._slots])
        if not packed or not observation.is_cpu:
            return None
        (parameters,), batch = packed, observation.shape[0]
        x, before = observation.to(parameters.dtype).contiguous(), [state[name].contiguous() for name in self._names]
        if not batch or x.shape != (batch, self._observed):
            return None
        for each in before:
            if each.shape != (batch, 1, self._channels) or each.dtype is not x.dtype or not each.is_cpu:
                return None
        after = [torch.empty_like(each) for each in before]
        policy, value = x.new_empty(batch, self._actions), x.new_empty(batch, 1)
        threads = min(torch.get_num_threads(), 1 + batch // ROWS_PER_THREAD)
        function(self._function, x.dtype)(
            self._sizes, self._norm.eps, self._fusion.past.eps, batch, threads, parameters.data_ptr(), x.data_ptr(),
            pointers(*before), pointers(*after), policy.data_ptr(), value.data_ptr(),
        )  # fmt: skip
        return Acted(policy, value, dict(zip(self._names, after, strict=True)))


class _Memory(NamedTuple):
    """What the C++ call wants to know of a kind of layer."""

    function: str
    slots: Callable[[Any], list[Slot]]
    derive: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """From the tensors in the slots: its map of what it sees, [G, F], the map's bias, [G], and all others."""


def _lru_slots(layer: LRULayer) -> list[Slot]:
    maps, size = (layer.decay_gate, layer.input_gate, layer.input), (layer.features,)
    bias = (layer.input, "bias", size) if layer.has_input_bias else (layer, "no_bias", size)
    weights: list[Slot] = [(each, "weight", 2 * size) for each in maps]
    return [*weights, (maps[0], "bias", size), (maps[1], "bias", size), bias, (layer, "rate", size)]


def _lru_derive(*parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias, rate, _ = side_by_side(*parameters)
    return weight, bias, rate


def _lstm_slots(layer: LSTMLayer) -> list[Slot]:
    size = layer.features
    maps: list[Slot] = [(layer, name, (4 * size, size)) for name in ("weight_ih", "weight_hh")]
    biases: list[Slot] = [(layer, name, (4 * size,)) for name in ("bias_ih", "bias_hh", "bias_mask")]
    return [maps[0], *biases, maps[1]]


def _lstm_derive(weight_ih: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return weight_ih, *bias_and_transposed(*others)


MEMORIES: dict[type[RecurrentLayer], _Memory] = {
    LRULayer: _Memory("act_lru", _lru_slots, _lru_derive),
    LSTMLayer: _Memory("act_lstm", _lstm_slots, _lstm_derive),
}


def _packed(
    shapes: list[tuple[int, ...]], derive: Callable[..., tuple[Tensor, Tensor, Tensor]], *tensors: Tensor | None
) -> tuple[Tensor, ...]:
    """The parameters in the order of acting.cpp, one after the other; () if they are no longer such as it takes."""
    given = [tensor for tensor in tensors if tensor is not None and tensor.is_cpu]
    dtypes = {tensor.dtype for tensor in given}
    if _shapes(given) != shapes or len(dtypes) != 1 or not dtypes <= DTYPES.keys():
        return ()
    encoder, *of_memory = given[:-8]
    *norms, policy, policy_bias, value, value_bias = given[-8:]
    weight, bias, others = derive(*of_memory)
    # the maps of encoder and memory are one map of the observation, where that is no more to multiply
    map_t = (weight @ encoder).t() if encoder.shape[1] <= encoder.shape[0] else weight.t()
    in_order = (encoder.t(), map_t, bias, others, *norms, policy, value, policy_bias, value_bias)
    return (torch.cat([each.reshape(-1) for each in in_order]),)


def _shapes(tensors: Sequence[Tensor | None]) -> list[tuple[int, ...]]:
    return [() if tensor is None else tuple(tensor.shape) for tensor in tensors]
