"""Whether an agent's step while acting, from the observation to the heads, is one C++ call.

A step of a few dozen environments takes longer in torch's calls than in mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import NamedTuple

import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torch.nn.modules import module as nn_module

from cyborg_torchrl.cores import LayeredCore, TimescaleNorm
from cyborg_torchrl.cores.linear import Linear
from cyborg_torchrl.cores.native import IS_BUILT
from cyborg_torchrl.modules.backbone import Backbone
from cyborg_torchrl.modules.encoders import VectorEncoder
from cyborg_torchrl.modules.fusion import PastPresentFusion
from cyborg_torchrl.modules.native_network import MEMORIES, NativeNetwork


class Parts(NamedTuple):
    """The networks of a `PPOAgent`."""

    encoder: TensorDictModule
    backbone: Backbone
    fusion: TensorDictModule
    policy_head: TensorDictModule
    value_head: TensorDictModule


class NativeStep:
    """Finds what takes a step of an agent's networks in one C++ call, where there is such a call.

    There is one for an `lru` or `lstm` of one layer with its read-out normalised by time-scales, behind an encoder of
    one vector by one map, with a plain fusion of equal widths and linear heads; all float32, or all float64, on a CPU.
    There is none for anything else in their place, and none where there are hooks, a gradient is asked for, or under
    autocast, torch.func or torch.compile.
    """

    def __init__(self) -> None:
        self._parts: Sequence[nn.Module | None] = (None,) * len(Parts._fields)
        self._network: NativeNetwork | None = None

    def of(self, parts: Parts) -> NativeNetwork | None:
        """What runs these networks here and now, as they are now."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not IS_BUILT:
            return None
        if not (all(map(is_, parts, self._parts)) and self._is_as_found()):
            self._find(parts)
        if self._network is None or any(self._hooks):
            return None
        is_transformed = torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active()
        return None if is_transformed else self._network

    def __reduce__(self) -> tuple[type[NativeStep], tuple[()]]:
        """Copies begin anew."""
        return NativeStep, ()

    def _find(self, parts: Parts) -> None:
        self._parts, self._network = parts, _network_of(parts)
        modules = self._modules = [module for part in parts for module in part.modules()]
        everywhere = nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks
        self._hooks = [*everywhere, *(m._forward_hooks for m in modules), *(m._forward_pre_hooks for m in modules)]
        # what a module does depends on its kind, its parts, and whether it has attributes (a forward) of its own
        self._kinds, self._attributes = list(map(type, modules)), [module.__dict__ for module in modules]
        self._numbers = list(map(len, self._attributes))
        self._children = [module._modules for module in modules]
        self._children_then = [dict(children) for children in self._children]

    def _is_as_found(self) -> bool:
        """Without a loop in Python: its time counts while acting."""
        return (
            self._children == self._children_then
            and list(map(type, self._modules)) == self._kinds
            and list(map(len, self._attributes)) == self._numbers
        )


def _network_of(parts: Parts) -> NativeNetwork | None:
    """What runs the networks, if they are such."""
    encoder, backbone, fusion, policy, value = parts
    if type(backbone) is not Backbone or not _are_in_order(backbone, encoder, fusion, policy, value):
        return None
    core, embed, meet, heads = backbone.core, encoder.module, fusion.module, (policy.module, value.module)
    if not (type(core) is LayeredCore and type(embed) is VectorEncoder and type(meet) is PastPresentFusion):
        return None
    if len(core.layers) != 1 or len(embed.network) != 1 or type(core.layers[0]) not in MEMORIES:
        return None
    layer, norm = core.layers[0], core.readouts[0]
    linears = [embed.last, *heads, *layer.children()]
    is_known = (
        all(type(each) in (nn.Linear, Linear) for each in linears)
        and type(norm) is TimescaleNorm
        and norm.timescales is None
        and meet.is_plain
        and type(meet.past) is type(meet.present) is nn.LayerNorm
        and meet.past.eps == meet.present.eps
        and not any("forward" in module.__dict__ for part in parts for module in part.modules())
    )
    try:
        return NativeNetwork(embed.last, layer, norm, meet, heads) if is_known else None
    except (KeyError, ValueError):  # a parameter of another shape, taken away, or elsewhere for a while
        return None


def _are_in_order(backbone: Backbone, *wrappers: TensorDictModule) -> bool:
    """Whether the TensorDictModules call their networks plainly, each on what the one before wrote."""
    if not all(
        type(each) is TensorDictModule
        and not (each._kwargs or each.method_kwargs or each._get_kwargs)
        and each.method is None
        for each in wrappers
    ):
        return False
    encoder, fusion, policy, value = wrappers
    return (
        encoder.out_keys == [backbone.in_key]
        and fusion.in_keys == [backbone.in_key, backbone.out_key]
        and fusion.out_keys == policy.in_keys == value.in_keys
        and len(encoder.in_keys) == len(policy.out_keys) == len(value.out_keys) == 1
    )
