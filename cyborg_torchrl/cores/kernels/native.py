"""What was built in C++: found, and loaded.

It is built when the package is installed, where there is a compiler (`hatch_build.py`), for the instruction sets that
torch itself distinguishes. Nothing is missing without it but speed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: "float32", torch.float64: "float64"}
CAPABILITIES = ("avx512", "avx2", "default")
INTERFACE = 11
"""Number of the functions' interface; a library of another is as good as none."""
FOLDER = Path(__file__).parent
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64
ARGUMENTS = {
    "scan_forward": [POINTER, INTEGER, *[POINTER] * 5],
    "scan_backward": [POINTER, INTEGER, *[POINTER] * 6],
    "recur": [POINTER, INTEGER, *[POINTER] * 3],
    "recur_backward": [POINTER, INTEGER, *[POINTER] * 6],
    "gru": [POINTER, INTEGER, *[POINTER] * 3],
    "gru_backward": [POINTER, INTEGER, *[POINTER] * 3],
    "lstm": [POINTER, INTEGER, *[POINTER] * 3],
    "lstm_backward": [POINTER, INTEGER, *[POINTER] * 3],
    "act_lru": [POINTER, ctypes.c_double, ctypes.c_double, INTEGER, INTEGER, *[POINTER] * 6],
    "act_lstm": [POINTER, ctypes.c_double, ctypes.c_double, INTEGER, INTEGER, *[POINTER] * 6],
    "norm": [POINTER, INTEGER, ctypes.c_double, *[POINTER] * 3],
    "added_norms": [INTEGER, INTEGER, INTEGER, ctypes.c_double, POINTER, POINTER],
    "read": [POINTER, INTEGER, *[POINTER] * 3],
    "norm_backward": [POINTER, INTEGER, ctypes.c_double, *[POINTER] * 4],
}


@cache
def library() -> ctypes.CDLL | None:
    """The C++ functions, built for this processor; None where there are none."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    usable = CAPABILITIES[CAPABILITIES.index(capability) :] if capability in CAPABILITIES else CAPABILITIES[-1:]
    for name in usable:
        try:
            found = ctypes.CDLL(os.fspath(FOLDER / f"_native_{name}.so"))
        except OSError:  # not built, or built on another system
            continue
        if found.cyborg_interface() == INTERFACE:
            return found
    return None


IS_BUILT = library() is not None


def is_native(tensor: Tensor) -> bool:
    """Whether there are C++ functions for such tensors. What is exported runs where they are not."""
    is_for_them = IS_BUILT and tensor.device.type == "cpu" and tensor.dtype in DTYPES
    return is_for_them and not torch.compiler.is_exporting()


def needs_operator(tensors: Iterable[Tensor]) -> bool:
    """Whether a C++ function has to be called as torch's operator: for a gradient, or to be compiled."""
    is_differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return is_differentiated or torch.compiler.is_compiling()


@cache
def function(name: str, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
    """A C++ function for numbers of a type.

    Raises:
        RuntimeError: if it was not built here.
    """
    found = library()
    if found is None:
        raise RuntimeError("nothing was built in C++ here: install the package where there is a C++ compiler.")
    run = found[f"cyborg_{name}_{DTYPES[dtype]}"]
    run.argtypes, run.restype = ARGUMENTS[name], None
    return run


def pointers(*tensors: Tensor | None) -> ctypes.Array[ctypes.c_void_p]:
    """Where the tensors lie, as C++ takes them; None is nowhere."""
    return (POINTER * len(tensors))(*[None if tensor is None else tensor.data_ptr() for tensor in tensors])


def integers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    """Numbers, as C++ takes them."""
    return (INTEGER * len(values))(*values)
