"""Recorded operations of torch: a stand-in for CUDA graphs, and counts of launches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
"""Operations whose result the CPU has to wait for: a number, or a size."""
INDEXING = {"index", "index_put_", "_index_put_impl_"}
WITHOUT_LAUNCH = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
    "_unsafe_view",
}
WITHOUT_LAUNCH |= {"_record_function_enter_new", "_record_function_exit"}


class Launches(TorchDispatchMode):
    """The names of the operations of a computation, in their order.

    It keeps no tensor. Otherwise autograd would copy gradients instead of handing them over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        """Operations that compute something; views do not."""
        self.waiting: list[str] = []
        self.kernels: list[str] = []
        """Names of the C++ and Triton kernels."""
        self._reads = Reads(self.waiting)

    def __enter__(self):
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = _name(func)
        flags = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, Tensor) and leaf.dtype == torch.bool]
        if name in WAITING or (name in INDEXING and flags):
            self.waiting.append(name)
        if name.startswith("run"):
            self.kernels.append(args[0])
        if not func.is_view and name not in WITHOUT_LAUNCH:
            self.launches.append(name)
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Adds the calls that read a tensor without an operation, on a CPU."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            self._names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    """The operations of a computation, in their order, to be repeated."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self._overwritten: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._overwritten += [(tensor, tensor.clone()) for tensor in tree_leaves(value) if tensor is not None]
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, result))
        return result

    @staticmethod
    def of(run: Callable[[], Any]) -> Recording:
        """Record a computation. What it overwrites is put back, and so is torch's generator."""
        random_state, recording = torch.get_rng_state(), Recording()
        with recording:
            run()
        with torch.no_grad():
            for tensor, before in reversed(recording._overwritten):
                tensor.copy_(before)
        torch.set_rng_state(random_state)
        return recording

    def replay(self) -> None:
        """Repeat the operations, and write their results where they were at first."""
        with torch.no_grad():
            for func, args, kwargs, result in self._calls:
                if func.is_view or _name(func) in WITHOUT_LAUNCH:
                    continue
                again = func(*args, **kwargs)
                for place, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                        place.copy_(value)


def _name(func: Any) -> str:
    return func._schema.name.split("::")[1]


def replace_everywhere(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], substitute: Callable[..., Any]
) -> None:
    """Replace a function in all modules of the package that have imported it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("cyborg_torchrl.") and vars(module).get(function.__name__) is function:
            monkeypatch.setattr(module, function.__name__, substitute)
