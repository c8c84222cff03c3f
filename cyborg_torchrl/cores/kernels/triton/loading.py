"""The choice and the loading of Triton kernels.

Kernels are in the files of `source/`. Each computes a whole sequence in one launch, step by step and in float32.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

LOGGER = logging.getLogger(__name__)
SOURCE = Path(__file__).parent / "source"
PACKAGE = "_cyborg_kernels"
MIN_VERSION = (3, 6)
"""The version that torch 2.11, the oldest supported torch, installs."""
MIN_CAPABILITY = (8, 0)
SWITCH = "CYBORG_TRITON"
"""Environment variable. 0 turns the kernels off."""


def is_triton(tensor: Tensor) -> bool:
    """Return True if the Triton kernels can be used: float32 on a GPU that supports them, and not during an export.

    The first answer for a GPU is logged.
    """
    # The test for a GPU comes first. On a CPU it is all that this function costs.
    if not tensor.is_cuda or tensor.dtype is not torch.float32 or torch.compiler.is_exporting():
        return False
    return _is_supported(tensor.get_device())


def reason_against(device: torch.device, dtype: torch.dtype) -> str:
    """Return why the Triton kernels cannot be used for tensors of a device and a dtype, or an empty string."""
    if device.type != "cuda":
        return f"the tensors are on {device}"
    if dtype is not torch.float32:
        return f"the tensors are {dtype}"
    return _reason_against(device.index or 0) or ""


@torch.compiler.assume_constant_result
def _is_supported(device: int) -> bool:
    return _reason_against(device) is None


@cache
def _reason_against(device: int) -> str | None:
    """Return why the kernels cannot be used on a GPU, or None. The answer is logged."""
    reason = _why_not(device)
    if reason is None:
        LOGGER.info("Recurrences run on Triton kernels (cuda:%d).", device)
    else:
        LOGGER.info("Recurrences run on the torch path (cuda:%d): %s.", device, reason)
    return reason


def _why_not(device: int) -> str | None:
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if torch.version.cuda is None:
        return "the kernels are written for NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"the kernels need compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
        return f"Triton {version} is older than {MIN_VERSION[0]}.{MIN_VERSION[1]}"
    return None


def shared_memory(tensor: Tensor) -> int:
    """Return the bytes of shared memory that a program may use on the GPU of a tensor."""
    return _shared_memory(tensor.get_device())


@torch.compiler.assume_constant_result
@cache
def _shared_memory(device: int) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@cache
def kernels(name: str) -> ModuleType:
    """Return the module `source/<name>.py`.

    It is loaded as a module of another package. Triton compiles a kernel's source text and its global names. An import
    hook that wraps the functions of this package, such as the tests' shape checker, would break both.
    """
    if PACKAGE not in sys.modules:
        spec = ModuleSpec(PACKAGE, None, is_package=True)
        spec.submodule_search_locations = [os.fspath(SOURCE)]
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{PACKAGE}.{name}")
