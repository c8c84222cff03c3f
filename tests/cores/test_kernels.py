"""mamba-ssm's operations behind our signatures. Some tests need a GPU, the others do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cyborg_torchrl.cores.kernels import native
from cyborg_torchrl.cores.kernels import official_mamba as kernels
from cyborg_torchrl.cores.kernels.official_mamba import Kernel, selective_scan_cuda, ssd_scan_cuda
from cyborg_torchrl.cores.selective_scan import selective_scan
from cyborg_torchrl.cores.ssd import ssd_scan

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA and mamba-ssm's kernels")


def mamba1_arguments(dtype: torch.dtype = torch.float32, steps: int = 9, device: str = "cpu") -> list[Tensor]:
    batch, channels, numbers = 3, 4, 2
    u, delta = torch.randn(2, steps, batch, channels, dtype=dtype)
    b, c = torch.randn(2, steps, batch, numbers, dtype=dtype)
    a = -torch.rand(channels, numbers, dtype=dtype) - 0.1
    h_0, initial = torch.randn(2, batch, channels, numbers, dtype=dtype)
    is_init = torch.rand(steps, batch) < 0.3
    is_init[0] = torch.tensor([True, False, False])
    arguments = [u, torch.exp(delta - 2), a, b, c, h_0, is_init, initial]
    return [x.to(device).requires_grad_(x.is_floating_point()) for x in arguments]


def mamba2_arguments(dtype: torch.dtype = torch.float32, steps: int = 9, device: str = "cpu") -> list[Tensor]:
    batch, heads, width, numbers = 3, 2, 4, 2
    u = torch.randn(steps, batch, heads, width, dtype=dtype)
    delta = torch.exp(torch.randn(steps, batch, heads, dtype=dtype) - 1)
    a = -torch.exp(torch.randn(heads, dtype=dtype))
    b, c = torch.randn(2, steps, batch, numbers, dtype=dtype)
    h_0, initial = torch.randn(2, batch, heads, width, numbers, dtype=dtype)
    is_init = torch.rand(steps, batch) < 0.3
    is_init[0] = torch.tensor([True, False, False])
    arguments = [u, delta, a, b, c, h_0, is_init, initial]
    return [v.to(device).requires_grad_(v.is_floating_point()) for v in arguments]


def assert_same(ours, theirs, arguments: list[Tensor], output: float, gradient: float) -> None:
    """Assert that outputs, last states and all gradients agree, gradients relative to the largest."""
    wanted = [x for x in arguments if x.requires_grad]
    results = []
    for function in (ours, theirs):
        y, last = function(*arguments)
        generator = torch.Generator().manual_seed(3)
        loss = sum((v * torch.randn(v.shape, generator=generator).to(v)).sum() for v in (y, last))
        results.append((y, last, torch.autograd.grad(loss, wanted)))
    (y, last, grads), (y_2, last_2, grads_2) = results
    assert (y - y_2).abs().max() <= output * max(1.0, y_2.abs().max())
    assert (last - last_2).abs().max() <= output * max(1.0, last_2.abs().max())
    for grad, expected in zip(grads, grads_2, strict=True):
        assert (grad - expected).abs().max() <= gradient * max(1.0, expected.abs().max())


def test_stored_states_and_resets_through_the_signature_of_mamba_1(mamba_ssm) -> None:
    """The official reference replaces the kernel: like the kernel, it starts from zero and has no resets."""

    def wrapped(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan_cuda(*arguments, operation=mamba_ssm.selective_scan_ref)

    assert_same(selective_scan, wrapped, mamba1_arguments(), 1e-6, 1e-5)


def test_stored_states_and_resets_through_the_signature_of_mamba_2(mamba_ssm) -> None:
    """The official listing of SSD, run episode by episode, replaces the kernel."""

    def operation(x, dt, a, b, c, chunk_size, initial_states, seq_idx, return_final_states):
        assert chunk_size > 0
        assert return_final_states
        rows, finals = [], []
        for row in range(x.shape[0]):
            state = initial_states[row : row + 1]
            parts = []
            for index in range(int(seq_idx[row].max()) + 1):
                here = seq_idx[row] == index
                if index:
                    state = torch.zeros_like(state)
                if here.any():
                    inputs = (v[row : row + 1, here] for v in (x * dt.unsqueeze(-1), dt * a))
                    heads = (v[row : row + 1, here].expand(-1, -1, x.shape[2], -1) for v in (b, c))
                    y, state = mamba_ssm.ssd_minimal_discrete(*inputs, *heads, 1, state.unsqueeze(1))
                    parts.append(y)
            rows.append(torch.cat(parts, 1))
            finals.append(state)
        return torch.cat(rows), torch.cat(finals)

    def wrapped(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_scan_cuda(*arguments, operation=operation)

    assert_same(ssd_scan, wrapped, mamba2_arguments(), 1e-6, 1e-5)


CPU, GPU = torch.device("cpu"), torch.device("cuda")
SCANS = {name: lambda: None for name in ("torch", "cpp", "cuda")}
BUILT = pytest.mark.skipif(native.library() is None, reason="needs the C++ scan")


def test_a_cpu_uses_the_torch_scan_if_no_other_is_built(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert Kernel("auto", SCANS).choose(CPU, torch.float32) == "torch"
    with pytest.raises(
        RuntimeError, match=r"'cpp' cannot be used: it was not built here.*use kernel 'auto' or 'torch'"
    ):
        Kernel("cpp", SCANS).choose(CPU, torch.float32)


@BUILT
def test_a_cpu_uses_the_cpp_scan_if_possible() -> None:
    assert [Kernel("auto", SCANS).choose(CPU, dtype) for dtype in (torch.float32, torch.bfloat16)] == ["cpp", "torch"]
    assert Kernel("torch", SCANS).choose(CPU, torch.float32) == "torch"
    assert Kernel("auto", {"torch": SCANS["torch"]}).choose(CPU, torch.float32) == "torch"
    with pytest.raises(RuntimeError, match=r"the tensors are torch\.bfloat16"):
        Kernel("cpp", SCANS).choose(CPU, torch.bfloat16)


def test_an_unavailable_kernel_is_a_clear_error() -> None:
    with pytest.raises(RuntimeError, match="the tensors are on cpu; use kernel 'auto' or 'torch'"):
        Kernel("cuda", SCANS).choose(CPU, torch.float32)


def test_auto_does_not_use_an_inexact_kernel(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_why_not", lambda: "")
    assert Kernel("auto", SCANS, is_cuda_exact=False).choose(GPU, torch.float32) == "torch"
    assert Kernel("cuda", SCANS, is_cuda_exact=False).choose(GPU, torch.float32) == "cuda"


def test_double_precision_on_a_gpu_takes_the_torch_path(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_why_not", lambda: "")
    choices = [Kernel("auto", SCANS).choose(GPU, dtype) for dtype in (torch.float32, torch.float64)]
    assert choices == ["cuda", "torch"]
    with pytest.raises(RuntimeError, match=r"the tensors are torch\.float64"):
        Kernel("cuda", SCANS).choose(GPU, torch.float64)


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(ValueError, match="unknown kernel 'cudda': did you mean 'cuda'"):
        Kernel("cudda", SCANS)


def test_auto_without_the_package_says_so_once(monkeypatch, caplog) -> None:
    for cached in (kernels._why_not, kernels._log_once):
        cached.cache_clear()

    def missing() -> dict:
        raise ImportError("No module named 'mamba_ssm'")

    monkeypatch.setattr(kernels, "_operations", missing)
    with caplog.at_level("INFO"):
        assert {Kernel("auto", SCANS).choose(GPU, torch.float32) for _ in range(3)} == {"torch"}
    lines = [record.message for record in caplog.records if record.name == kernels.__name__]
    assert lines == [
        "Mamba runs on the torch path (mamba-ssm is not usable here (No module named 'mamba_ssm'); "
        "see docs/backbones/mamba.md)."
    ]
    with pytest.raises(RuntimeError, match="No module named 'mamba_ssm'"):
        Kernel("cuda", SCANS).choose(GPU, torch.float32)
    kernels._why_not.cache_clear()


@NEEDS_GPU
@pytest.mark.gpu
def test_the_kernel_of_mamba_1_equals_the_torch_path() -> None:
    pytest.importorskip("mamba_ssm")
    assert_same(selective_scan, selective_scan_cuda, mamba1_arguments(steps=130, device="cuda"), 1e-4, 1e-3)


@NEEDS_GPU
@pytest.mark.gpu
def test_the_kernel_of_mamba_2_equals_the_torch_path() -> None:
    pytest.importorskip("mamba_ssm")
    assert_same(ssd_scan, ssd_scan_cuda, mamba2_arguments(steps=130, device="cuda"), 1e-2, 1e-2)
