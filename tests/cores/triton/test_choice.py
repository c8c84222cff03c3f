"""The choice of the Triton kernels, and what it says where they cannot be used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cyborg_torchrl.cores.kernels import native
from cyborg_torchrl.cores.kernels.choice import kernel_for
from cyborg_torchrl.cores.kernels.official_mamba import Kernel
from cyborg_torchrl.cores.kernels.triton import launch, loading


class OnGPU(Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0


def on_gpu(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(1, dtype=dtype).as_subclass(OnGPU)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretends that there is a GPU and a Triton."""

    def pretend(capability: tuple[int, int] = (9, 0), version: str | None = "3.7.1", cuda: str | None = "13.0") -> None:
        loading._reason_against.cache_clear()

        def imported(name: str) -> SimpleNamespace:
            if version is None:
                raise ImportError("No module named 'triton'")
            return SimpleNamespace(__version__=version)

        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(loading.importlib, "import_module", imported)

    yield pretend
    loading._reason_against.cache_clear()


def test_a_cpu_never_uses_triton() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        is_cpp = native.IS_BUILT and dtype in native.DTYPES
        assert kernel_for(torch.zeros(1, dtype=dtype)) == ("cpp" if is_cpp else "torch")


def test_a_gpu_uses_triton_for_float32_and_says_so_once(gpu, caplog) -> None:
    gpu()
    with caplog.at_level(logging.INFO):
        assert [kernel_for(on_gpu()) for _ in range(3)] == ["triton"] * 3
        assert kernel_for(on_gpu(torch.float64)) == kernel_for(on_gpu(torch.bfloat16)) == "torch"
    assert [record.message for record in caplog.records] == ["Recurrences run on Triton kernels (cuda:0)."]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"capability": (7, 5)}, "the kernels need compute capability 8.0"),
        ({"version": None}, "Triton cannot be imported (No module named 'triton')"),
        ({"version": "3.5.1"}, "Triton 3.5.1 is older than 3.6"),
        ({"cuda": None}, "the kernels are written for NVIDIA GPUs"),
    ],
)
def test_a_gpu_without_kernels_takes_the_torch_path_and_says_why_once(gpu, caplog, given: dict, reason: str) -> None:
    gpu(**given)
    with caplog.at_level(logging.INFO):
        assert {kernel_for(on_gpu()) for _ in range(3)} == {"torch"}
    assert [record.message for record in caplog.records] == [f"Recurrences run on the torch path (cuda:0): {reason}."]


def test_the_kernels_can_be_turned_off(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu()
    monkeypatch.setenv("CYBORG_TRITON", "0")
    assert kernel_for(on_gpu()) == "torch"


def test_an_export_takes_the_torch_path(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu()
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert kernel_for(on_gpu()) == "torch"


def test_kernels_are_loaded_outside_of_the_package() -> None:
    """The shape checker of the tests rewrites the functions of the package, which Triton cannot compile."""
    pytest.importorskip("triton", reason="Triton is not installed (make test installs it)")
    module = loading.kernels("functions")
    assert module.__name__ == "_cyborg_kernels.functions"
    assert loading.kernels("functions") is module


@pytest.mark.parametrize(("n", "power"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_powers_of_two(n: int, power: int) -> None:
    assert launch.next_power_of_2(n) == power
    assert launch.ceil_div(n, 2) == (n + 1) // 2


def test_a_mamba_core_prefers_our_kernel_on_a_gpu(gpu) -> None:
    scans = {name: lambda: None for name in ("torch", "cpp", "triton", "cuda")}
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    gpu()
    assert Kernel("auto", scans).choose(cuda, torch.float32) == "triton"
    assert Kernel("auto", scans, is_cuda_exact=False).choose(cuda, torch.float32) == "triton"
    assert Kernel("auto", scans, is_cuda_exact=False).choose(cuda, torch.float64) == "torch"
    assert Kernel("triton", scans).choose(cuda, torch.float32) == "triton"
    with pytest.raises(RuntimeError, match=r"'triton' cannot be used: the tensors are torch\.float64"):
        Kernel("triton", scans).choose(cuda, torch.float64)
    with pytest.raises(RuntimeError, match="'triton' cannot be used: the tensors are on cpu"):
        Kernel("triton", scans).choose(cpu, torch.float32)
    gpu(version=None)
    with pytest.raises(RuntimeError, match=r"'triton' cannot be used: Triton cannot be imported"):
        Kernel("triton", scans).choose(cuda, torch.float32)
