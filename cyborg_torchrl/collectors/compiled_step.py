"""One C++ call for a step of an agent's networks, from the observation to the heads.

With a few dozen environments a step takes longer in torch's calls than in mathematics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tensordict.nn import TensorDictModule
from tensordict.utils import unravel_key
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from cyborg_torchrl.collectors.backbone_step import BackboneStep
from cyborg_torchrl.collectors.flat_dict import FlatDict
from cyborg_torchrl.cores import LayeredCore, LRULayer, LSTMLayer, RecurrentLayer, TimescaleNorm
from cyborg_torchrl.cores.kernels.native import DTYPES, IS_BUILT, function, integers, pointers
from cyborg_torchrl.modules import Backbone
from cyborg_torchrl.modules.encoders import ObservationEncoder, VectorEncoder
from cyborg_torchrl.modules.fusion import PastPresentFusion

ROWS_PER_THREAD = 128
"""Fewer rows are done before another thread has started."""


class Networks(NamedTuple):
    """The networks of a `PPOAgent`."""

    encoder: TensorDictModule
    backbone: Backbone
    fusion: TensorDictModule
    policy_head: TensorDictModule
    value_head: TensorDictModule


class CompiledStep:
    """A step of an agent's networks as one C++ call, with the parameters of the moment it was built.

    Args:
        networks: networks that `is_supported`.
        backbone: the step of the backbone among them.
        parameters: all parameters in one tensor, from `pack_parameters`.
        num_envs: rows of each step.
    """

    def __init__(self, networks: Networks, backbone: BackboneStep, parameters: Tensor, num_envs: int) -> None:
        core, fusion = networks.backbone.core, networks.fusion.module
        layer, norm, encoder = core.layers[0], core.readouts[0], networks.encoder.module.last
        self.backbone, self.parameters, self.num_envs = backbone, parameters, num_envs
        self.observed, self.channels = encoder.in_features, layer.features
        self.actions = networks.policy_head.module.out_features
        mapped = min(self.observed, self.channels)
        self._sizes = integers(self.observed, mapped, self.channels, self.channels // norm.groups, self.actions)
        self._epsilons = norm.eps, fusion.past.eps
        self._run = function(KINDS[type(layer)].function, parameters.dtype)
        self._names, self._read = layer.state_names, unravel_key(networks.encoder.in_keys[0])
        self._policy_key = unravel_key(networks.policy_head.out_keys[0])
        self._value_key = unravel_key(networks.value_head.out_keys[0])

    def __call__(self, entries: FlatDict) -> None:
        """Read the observation and the state; write the outputs of the heads and the next state.

        Raises:
            ValueError: if the observation or the state has another size, type or device.
        """
        x, state = entries[self._read].to(self.parameters.dtype).contiguous(), self.backbone.before(entries)
        before = [state[name].contiguous() for name in self._names]
        self._check(x, (self.num_envs, self.observed))
        for value in before:
            self._check(value, (self.num_envs, 1, self.channels))
        # New tensors at each step: the rollout keeps those of the steps before.
        after = [torch.empty_like(value) for value in before]
        policy, value = x.new_empty(self.num_envs, self.actions), x.new_empty(self.num_envs, 1)
        # Starting a thread costs as much as some rows, so small batches run on one.
        threads = min(torch.get_num_threads(), 1 + self.num_envs // ROWS_PER_THREAD)
        self._run(
            self._sizes, *self._epsilons, self.num_envs, threads, self.parameters.data_ptr(), x.data_ptr(),
            pointers(*before), pointers(*after), policy.data_ptr(), value.data_ptr(),
        )  # fmt: skip
        entries[self._policy_key], entries[self._value_key] = policy, value
        self.backbone.write(entries, dict(zip(self._names, after, strict=True)))

    def _check(self, tensor: Tensor, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that C++ would read beyond its end."""
        if tensor.shape != shape or tensor.dtype is not self.parameters.dtype or not tensor.is_cpu:
            raise ValueError(
                f"the compiled step needs {self.parameters.dtype} {list(shape)} on the CPU; got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}."
            )


def compile_step(networks: Networks, backbone: BackboneStep, num_envs: int) -> CompiledStep | None:
    """Return the C++ call for the networks as they are now, or None if there is none for them.

    There is none where a gradient is computed, under autocast, torch.func or torch.compile, and for networks that are
    not supported (`is_supported`). The parameters are copied, so the call is right until they change.

    Args:
        networks: the networks.
        backbone: the step of the backbone among them.
        num_envs: rows of each step.
    """
    is_plain_torch = not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    )
    if not (IS_BUILT and is_plain_torch and num_envs and is_supported(networks)):
        return None
    parameters = pack_parameters(networks)
    return None if parameters is None else CompiledStep(networks, backbone, parameters, num_envs)


def is_supported(networks: Networks) -> bool:
    """Return whether there is a C++ call for these networks.

    There is one for an `lru` or `lstm` of one layer with a time-scale norm. The encoder must be one linear map of one
    vector, the fusion a sum of equal widths, and the heads linear. No module may have hooks.
    """
    encoder, backbone, fusion, policy_head, value_head = networks
    wrappers = {type(each) for each in (encoder, fusion, policy_head, value_head)}
    if type(backbone) is not Backbone or wrappers - {TensorDictModule, ObservationEncoder}:
        return False
    core, embed, meet = backbone.core, encoder.module, fusion.module
    if type(core) is not LayeredCore or type(embed) is not VectorEncoder or type(meet) is not PastPresentFusion:
        return False
    if len(core.layers) != 1 or len(embed.network) != 1 or type(core.layers[0]) not in KINDS:
        return False
    norm, linears = core.readouts[0], [embed.last, policy_head.module, value_head.module, *core.layers[0].children()]
    return (
        all(type(each) is nn.Linear for each in linears)
        and type(norm) is TimescaleNorm
        and norm.timescales is None
        and meet.is_plain
        and type(meet.past) is type(meet.present) is nn.LayerNorm
        and meet.past.eps == meet.present.eps
        and _are_wired(networks)
        and not _have_hooks(networks)
    )


def _are_wired(networks: Networks) -> bool:
    """Tell whether each network reads the output of the one before it, as in a new `PPOAgent`."""
    encoder, backbone, fusion, policy_head, value_head = networks
    return (
        encoder.out_keys == [backbone.in_key]
        and fusion.in_keys == [backbone.in_key, backbone.out_key]
        and fusion.out_keys == policy_head.in_keys == value_head.in_keys
        and len(encoder.in_keys) == len(policy_head.out_keys) == len(value_head.out_keys) == 1
    )


def _have_hooks(networks: Networks) -> bool:
    modules = [module for network in networks for module in network.modules()]
    has_any = any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules)
    return has_any or bool(nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)


def pack_parameters(networks: Networks) -> Tensor | None:
    """Return all parameters one after the other, in the order of acting.cpp.

    Returns None if a parameter is missing, has another shape, or is not on the CPU in a type that C++ knows.
    """
    layer, fusion = networks.backbone.core.layers[0], networks.fusion.module
    embed, policy, value = networks.encoder.module.last, networks.policy_head.module, networks.value_head.module
    observed, channels, actions, kind = embed.in_features, layer.features, policy.out_features, KINDS[type(layer)]
    maps, bias, others = kind.parameters(layer)
    first = [
        (embed.weight, (channels, observed)),
        (maps, (kind.maps * channels, channels)),
        (bias, (kind.maps * channels,)),
        (others, (channels,) if others.ndim == 1 else (channels, kind.maps * channels)),
    ]
    norms = [(each, (channels,)) for norm in (fusion.past, fusion.present) for each in (norm.weight, norm.bias)]
    heads = [
        (policy.weight, (actions, channels)),
        (value.weight, (1, channels)),
        (policy.bias, (actions,)),
        (value.bias, (1,)),
    ]
    for tensor, shape in (*first, *norms, *heads):
        is_usual = tensor is not None and tensor.is_cpu and tensor.dtype in DTYPES
        if not is_usual or tensor.shape != shape or tensor.dtype is not maps.dtype:
            return None
    # encoder and memory both map the observation linearly: one map does it, if it is not larger
    map_t = (maps @ embed.weight).t() if observed <= channels else maps.t()
    rest = [tensor for tensor, _ in (*norms, *heads)]
    return torch.cat([each.reshape(-1) for each in (embed.weight.t(), map_t, bias, others, *rest)])


class _Kind(NamedTuple):
    """A kind of layer that there is a C++ step for."""

    function: str
    maps: int
    """Linear maps of the input, side by side."""
    parameters: Callable[[Any], tuple[Tensor, Tensor, Tensor]]
    """From a layer to its map of the input [maps * C, C], the bias [maps * C], and all others."""


def _lru_parameters(layer: LRULayer) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = layer.joined_maps()
    return weight, bias, layer.decay_rates()


def _lstm_parameters(layer: LSTMLayer) -> tuple[Tensor, Tensor, Tensor]:
    return layer.weight_ih, layer.bias(), layer.weight_hh.t()


KINDS: dict[type[RecurrentLayer], _Kind] = {
    LRULayer: _Kind("act_lru", 3, _lru_parameters),
    LSTMLayer: _Kind("act_lstm", 4, _lstm_parameters),
}
