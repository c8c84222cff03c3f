"""Loading of the C++ library.

`hatch_build.py` builds the library when the package is installed and a compiler is available. There is one library
for each instruction set that torch distinguishes. Without a library only speed is lost.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: "float32", torch.float64: "float64"}
CAPABILITIES = ("avx512", "avx2", "default")
INTERFACE = 15
"""Version of the C interface. A library with another version is not used."""
FOLDER = Path(__file__).parent
POINTER, INTEGER, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
# ctypes needs the types of arguments: it would pass a Python integer as 32 bits.
ARGUMENTS = [POINTER, INTEGER, NUMBER, POINTER, POINTER, POINTER]
ACT_ARGUMENTS = [POINTER, NUMBER, NUMBER, INTEGER, INTEGER, *[POINTER] * 6]
# C++ gets arrays of a fixed length. Missing sizes are zero, and missing tensors are null pointers.
SIZES, TENSORS = INTEGER * 5, POINTER * 16


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


def library_name() -> str | None:
    """Return the instruction set of the C++ library: avx512, avx2 or default; None if there is no library."""
    loaded = library()
    return None if loaded is None else Path(loaded._name).stem.removeprefix("_native_")


IS_BUILT = library() is not None


def is_native(tensor: Tensor) -> bool:
    """Return True if the C++ functions can be used: built, for tensors of this type, and not during an export."""
    is_supported = IS_BUILT and tensor.is_cpu and tensor.dtype in DTYPES
    # An exported policy runs without our library, so it must consist of torch's operations.
    return is_supported and not torch.compiler.is_exporting()


def needs_gradient(tensors: Iterable[Tensor]) -> bool:
    """Return True if the gradient of a result with respect to any of these tensors may be requested."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return a view of each tensor. torch.compile supports no autograd function that gets the same tensor twice."""
    return [tensor.view_as(tensor) for tensor in tensors]


def run(
    name: str,
    sizes: Sequence[int],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    is_init: Tensor | None = None,
    eps: float = 0.0,
    threads: int | None = None,
) -> None:
    """Run a C++ kernel, outside of autograd.

    Args:
        name: name of the kernel.
        sizes: steps, rows, channels, and other sizes that the kernel reads.
        inputs: contiguous tensors of one dtype.
        outputs: contiguous tensors of the same dtype, which the kernel writes.
        is_init: true where an episode begins, [steps, rows].
        eps: a small number that norms add.
        threads: number of threads. None: as many as torch uses.

    Raises:
        RuntimeError: if the C++ kernels were not built.
    """
    if torch.compiler.is_compiling():
        # torch.compile cannot look into C++, so it sees one operator. Elsewhere we avoid the operator's overhead.
        _operator(name, sizes, inputs, outputs, is_init, eps, threads)
        return
    function(name, inputs[0].dtype)(
        integers(*sizes),
        threads or torch.get_num_threads(),
        eps,
        pointers(*inputs),
        None if is_init is None else is_init.data_ptr(),
        pointers(*outputs),
    )


_operator = torch.library.custom_op(
    "cyborg_torchrl::run",
    mutates_args=("outputs",),
    device_types="cpu",
    schema="(str name, SymInt[] sizes, Tensor[] inputs, Tensor(a!)[] outputs, Tensor? is_init, float eps, int? threads)"
    " -> ()",
)(run)


@torch.compiler.assume_constant_result
def threads_for(rows: int) -> int:
    """Return the number of threads for a kernel that sums over rows, to allocate one sum for each thread.

    So threads need no locks, and the result does not depend on their timing.
    """
    return max(1, min(torch.get_num_threads(), rows))


@cache
def function(name: str, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
    """Return a C++ function for tensors of a dtype.

    Raises:
        RuntimeError: if the C++ kernels were not built.
    """
    built = library()
    if built is None:
        raise RuntimeError("nothing was built in C++ here: install the package where there is a C++ compiler.")
    found = built[f"cyborg_{name}_{DTYPES[dtype]}"]
    found.argtypes = ACT_ARGUMENTS if name.startswith("act_") else ARGUMENTS
    found.restype = None
    return found


def pointers(*tensors: Tensor) -> ctypes.Array[ctypes.c_void_p]:
    """Return the addresses of tensors as a C array."""
    return TENSORS(*[tensor.data_ptr() for tensor in tensors])


def integers(*values: int) -> ctypes.Array[ctypes.c_int64]:
    """Return integers as a C array."""
    return SIZES(*values)
