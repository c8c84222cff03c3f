"""Loading of the C++ library.

`hatch_build.py` builds the library when the package is installed and a compiler is available. There is one library
for each instruction set that torch distinguishes. Without a library only speed is lost.
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
"""Version of the C interface. A library with another version is not used."""
FOLDER = Path(__file__).parent
POINTER, INTEGER = ctypes.c_void_p, ctypes.c_int64
# ctypes needs the types of arguments: it would pass a Python integer as 32 bits.
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
    """Return the C++ library for this processor, or None if there is none."""
    # torch knows the processor's instruction set. Its name is also the first library to try, then older sets.
    capability = torch.backends.cpu.get_cpu_capability().lower()
    usable = CAPABILITIES[CAPABILITIES.index(capability) :] if capability in CAPABILITIES else CAPABILITIES[-1:]
    for name in usable:
        try:
            loaded = ctypes.CDLL(os.fspath(FOLDER / f"_native_{name}.so"))
        except OSError:  # not built, or built on another system
            continue
        # An editable installation may have a library that was built before the last change of the interface.
        if loaded.cyborg_interface() == INTERFACE:
            return loaded
    return None


IS_BUILT = library() is not None


def is_native(tensor: Tensor) -> bool:
    """Return True if the C++ functions can be used: built, for tensors of this type, and not during an export."""
    is_supported = IS_BUILT and tensor.device.type == "cpu" and tensor.dtype in DTYPES
    # An exported policy runs without our library, so it must consist of torch's operations.
    return is_supported and not torch.compiler.is_exporting()


def needs_operator(tensors: Iterable[Tensor]) -> bool:
    """Return True if a C++ function must be called as a torch operator: for a gradient, or under torch.compile."""
    is_differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return is_differentiated or torch.compiler.is_compiling()


@cache
def function(name: str, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
    """Return a C++ function for tensors of a dtype.

    Raises:
        RuntimeError: if the C++ kernels were not built.
    """
    built = library()
    if built is None:
        raise RuntimeError("nothing was built in C++ here: install the package where there is a C++ compiler.")
    run = built[f"cyborg_{name}_{DTYPES[dtype]}"]
    run.argtypes, run.restype = ARGUMENTS[name], None
    return run


def pointers(*tensors: Tensor | None) -> ctypes.Array[ctypes.c_void_p]:
    """Return the addresses of tensors as a C array. None becomes a null pointer."""
    return (POINTER * len(tensors))(*[None if tensor is None else tensor.data_ptr() for tensor in tensors])


def integers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    """Return integers as a C array."""
    return (INTEGER * len(values))(*values)
