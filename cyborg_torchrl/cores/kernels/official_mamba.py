"""The choice of a scan for the Mamba cores, and mamba-ssm's CUDA kernels with the signatures of our scans.

Our signatures have stored states, resets and initial states. The modules of mamba-ssm expose none of these, so we
wrap its operations. The package is imported at the first use of a kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cyborg_torchrl.cores.kernels.native import DTYPES, library
from cyborg_torchrl.cores.kernels.triton import loading
from cyborg_torchrl.registry import check_known

LOGGER = logging.getLogger(__name__)
TINY_STEP = 1e-9
"""Step size of the virtual inputs that load a stored state into a kernel that starts from zero."""
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Types that mamba-ssm's kernels support."""
FORGET = 110.0
"""Exponent of a reset: exp(-110) is zero in float32."""


class Kernel:
    """The choice of the scan of a Mamba core.

    Args:
        name: "torch", "cpp" (the C++ scan for float32 and float64 on a CPU), "triton" (our kernels for float32 on a
            GPU), or "cuda" (mamba-ssm's kernels). "auto" is the fastest exact scan that is available.
        scans: the scans by name. "torch" is required.
        is_cuda_exact: True if the CUDA scan is as precise as the torch scan. Otherwise "auto" does not use it.

    Raises:
        ValueError: for an unknown name.
    """

    def __init__(self, name: str, scans: dict[str, Callable[..., Any]], is_cuda_exact: bool = True) -> None:
        check_known("kernel", name, ("auto", *scans))
        self.name, self.scans, self.is_cuda_exact = name, scans, is_cuda_exact

    def choose(self, device: torch.device, dtype: torch.dtype) -> str:
        """Return the name of the scan for a device and a dtype. On a GPU the choice is logged once.

        Raises:
            RuntimeError: if a scan is requested by name and not available.
        """
        # An exported policy runs without our library and without mamba-ssm.
        if self.name == "torch" or torch.compiler.is_exporting():
            return "torch"
        fast = self.name if self.name != "auto" else self._fastest(device, dtype)
        if fast not in self.scans:
            return "torch"
        reason = _why_not_for(fast, device, dtype)
        if fast == "cuda" and self.name == "auto" and not self.is_cuda_exact:
            reason = "mamba-ssm's kernels round what they multiply; kernel 'cuda' takes them nevertheless"
        if reason and self.name != "auto":
            raise RuntimeError(f"kernel '{self.name}' cannot be used: {reason}; use kernel 'auto' or 'torch'.")
        if fast == "cuda":
            _log_once("mamba-ssm's CUDA kernels" if not reason else f"the torch path ({reason})")
        return "torch" if reason else fast

    def _fastest(self, device: torch.device, dtype: torch.dtype) -> str:
        if device.type != "cuda":
            return "cpp"
        # Our kernels have resets and stored states, and their steps round like their sequences.
        return "triton" if "triton" in self.scans and not loading.reason_against(device, dtype) else "cuda"

    def scan_for(self, tensor: Tensor) -> Callable[..., Any]:
        """Return the scan for sequences with the device and dtype of this tensor, as `choose` does."""
        return self.scans[self.choose(tensor.device, tensor.dtype)]


def selective_scan_cuda(
    u: Float[Tensor, "T B D"],
    delta: Float[Tensor, "T B D"],
    a: Float[Tensor, "D N"],
    b: Float[Tensor, "T B N"],
    c: Float[Tensor, "T B N"],
    h_0: Float[Tensor, "B D N"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B D N"],
    operation: Callable[..., Any] | None = None,
) -> tuple[Float[Tensor, "T B D"], Float[Tensor, "B D N"]]:
    """Run `selective_scan` with mamba-ssm's `selective_scan_fn`, whose kernel starts from zero and has no resets.

    N virtual inputs with a tiny step load the stored state: input k writes number k of the state. N virtual steps at
    the end read the last state in the same way. A reset is a step so long that the state decays to zero. Its input is
    scaled down, so the step writes the right value. An initial state that is not zero decays after each reset. Its
    contribution is added in torch.

    Args:
        u: this and all arguments up to `initial` are those of `selective_scan`.
        operation: replacement for `selective_scan_fn`. Tests pass the package's reference in torch.
    """
    scan = operation or _operations()["selective_scan_fn"]
    steps, batch, _ = u.shape
    numbers = a.shape[1]
    # The state of an ended episode may contain NaN, which no decay removes.
    h_0 = torch.where(is_init[0, :, None, None], torch.zeros_like(h_0), h_0)
    long = delta + is_init.unsqueeze(-1) * (FORGET / (-a.detach()).min())
    # N virtual steps before the sequence write the stored state, and N after it read the last state. The kernel can
    # return its last state, but without a gradient.
    tiny = torch.full_like(h_0, TINY_STEP).movedim(-1, 0)
    u_all = torch.cat([h_0.movedim(-1, 0) / TINY_STEP, u * (delta / long), torch.zeros_like(tiny)])
    delta_all = torch.cat([tiny, long, tiny])
    unit = torch.eye(numbers, dtype=b.dtype, device=b.device).unsqueeze(1).expand(numbers, batch, numbers)
    nothing = torch.zeros_like(unit)
    b_all, c_all = torch.cat([unit, b, nothing]), torch.cat([nothing, c, unit])
    # the kernel expects [B, channels, T]
    y = scan(*(x.permute(1, 2, 0).contiguous() for x in (u_all, delta_all)), a,
             *(x.permute(1, 2, 0).contiguous() for x in (b_all, c_all)))  # fmt: skip
    y, last = y.permute(2, 0, 1).split([numbers + steps, numbers])
    y, last = y[numbers:], last.movedim(0, -1)
    if _is_zero(initial):
        return y, last
    since, has_begun = _since_reset(delta, is_init)
    share = torch.exp(since.unsqueeze(-1) * a).masked_fill(~has_begun[..., None, None], 0.0)
    y = y + torch.einsum("tbdn,tbn,bdn->tbd", share, c, initial)
    return y, last + share[steps - 1] * initial


def ssd_scan_cuda(
    u: Float[Tensor, "T B H P"],
    delta: Float[Tensor, "T B H"],
    a: Float[Tensor, " H"],
    b: Float[Tensor, "T B N"],
    c: Float[Tensor, "T B N"],
    h_0: Float[Tensor, "B H P N"],
    is_init: Bool[Tensor, "T B"],
    initial: Float[Tensor, "B H P N"],
    operation: Callable[..., Any] | None = None,
) -> tuple[Float[Tensor, "T B H P"], Float[Tensor, "B H P N"]]:
    """Run `ssd_scan` with mamba-ssm's `mamba_chunk_scan_combined`, which accepts stored states and sequence numbers.

    The stored state belongs to sequence 0. A row that begins with a reset begins with sequence 1. The contribution of
    an initial state that is not zero is added in torch.

    Args:
        u: this and all arguments up to `initial` are those of `ssd_scan`.
        operation: replacement for `mamba_chunk_scan_combined` in tests.
    """
    scan = operation or _operations()["mamba_chunk_scan_combined"]
    # The state of an ended episode may contain NaN. Replace it by zero instead of relying on the kernel.
    h_0 = torch.where(is_init[0, :, None, None, None], torch.zeros_like(h_0), h_0)
    y, last = scan(
        u.transpose(0, 1).contiguous(),
        delta.transpose(0, 1).contiguous(),
        a,
        b.transpose(0, 1).unsqueeze(2).contiguous(),
        c.transpose(0, 1).unsqueeze(2).contiguous(),
        chunk_size=64,
        initial_states=h_0.contiguous(),
        seq_idx=is_init.t().cumsum(1).to(torch.int32).contiguous(),
        return_final_states=True,
    )
    y = y.transpose(0, 1)
    if _is_zero(initial):
        return y, last
    since, has_begun = _since_reset(delta, is_init)
    share = torch.exp(since * a).masked_fill(~has_begun.unsqueeze(-1), 0.0)
    y = y + torch.einsum("tbh,tbn,bhpn->tbhp", share, c, initial)
    return y, last + share[-1, ..., None, None] * initial


def _is_zero(initial: Tensor) -> bool:
    return not initial.requires_grad and not bool(initial.any())


def _since_reset(values: Float[Tensor, "T B *C"], is_init: Bool[Tensor, "T B"]) -> tuple[Tensor, Tensor]:
    """Return sums from the last reset up to and including each step, and a mask of steps after a reset."""
    total = values.cumsum(0)
    index = torch.arange(values.shape[0], device=values.device).unsqueeze(1)
    last = torch.where(is_init, index, -1).cummax(0).values
    picked = last.clamp_min(0).unsqueeze(-1).expand_as(values)
    return total - (total - values).gather(0, picked), last >= 0


@cache
def _operations() -> dict[str, Callable[..., Any]]:
    """Return mamba-ssm's operations. Raise ImportError if the package is missing or was built without kernels."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return {"selective_scan_fn": selective_scan_fn, "mamba_chunk_scan_combined": mamba_chunk_scan_combined}


def _why_not_for(scan: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the reason why a scan other than "torch" cannot be used for such tensors, or an empty string."""
    if scan == "triton":
        return loading.reason_against(device, dtype)
    wanted, dtypes = ("cuda", KERNEL_DTYPES) if scan == "cuda" else ("cpu", DTYPES)
    if device.type != wanted:
        return f"the tensors are on {device}"
    if dtype not in dtypes:
        return f"the tensors are {dtype}"
    if scan == "cuda":
        return _why_not()
    return "" if library() else "it was not built here, where the package was installed without a C++ compiler"


@cache
def _why_not() -> str:
    """Return the reason why mamba-ssm's kernels cannot be used, or an empty string if they can."""
    try:
        _operations()
    except ImportError as error:
        return f"mamba-ssm is not usable here ({error}); see docs/backbones/mamba.md"
    return ""


@cache
def _log_once(choice: str) -> None:
    LOGGER.info("Mamba runs on %s.", choice)
