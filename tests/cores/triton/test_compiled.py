"""Kernels compiled for GPUs that need not be there, exactly as they would be launched.

Triton compiles for any NVIDIA GPU, and its package has the tools that tell what the machine code uses.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cyborg_torchrl.cores.kernels.triton import (
    causal_conv,
    gated_readout,
    gated_recurrence,
    group_norm,
    gru,
    linear_scan,
    lstm,
    resident,
    selective_scan,
)

triton = pytest.importorskip("triton", reason="Triton is not installed (make test installs it)")
jit = pytest.importorskip("triton.runtime.jit")
tl = pytest.importorskip("triton.language")

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that a program may use, by compute capability: A100, H100 and H200, RTX of 2025."""
TYPES = {torch.float32: "*fp32", torch.bool: "*i1"}
CHOICES = ("num_warps", "num_stages", "maxnreg")


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """All launches of the test, which are only recorded."""
    recorded = []

    def run(kernel, *arguments, grid, warmup, **constants):
        recorded.append(Launch(kernel, arguments, constants))

    monkeypatch.setattr(jit.JITFunction, "run", run)
    return recorded


def compiled(launch: Launch, capability: int) -> Any:
    """Compile a launch as it would be on a GPU, where tensors begin at multiples of 16 bytes."""
    names = launch.kernel.arg_names
    signature, attributes = dict.fromkeys(names, "constexpr"), {}
    unspecialized = {names[i] for i in launch.kernel.do_not_specialize if isinstance(i, int)}
    unspecialized |= {i for i in launch.kernel.do_not_specialize if isinstance(i, str)}
    for i, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(value, Tensor):
            assert value.is_contiguous()
            signature[name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            # Triton would compile other code for 1 and for multiples of 16, which may round differently.
            assert isinstance(value, float) or name in unspecialized, f"{name} would be specialized"
    constants = {name: value for name, value in launch.constants.items() if name not in CHOICES}
    options = {name: value for name, value in launch.constants.items() if name in CHOICES}
    assert set(constants) == {name for name, kind in signature.items() if kind == "constexpr"}
    source = triton.compiler.ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


def assert_fits(launch: Launch, capability: int, tmp_path: Path) -> None:
    """The machine code keeps float32, leaves nothing in local memory, fits into shared memory and has no atomics."""
    kernel = compiled(launch, capability)
    assert "tf32" not in kernel.asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"])
    assert kernel.metadata.shared <= SHARED_MEMORY[capability]
    path = tmp_path / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    spilled = dict(re.findall(r"(STACK|LOCAL):(\d+)", usage))
    assert spilled == {"STACK": "0", "LOCAL": "0"}, f"{launch.kernel.__name__}: {usage}"


def distinct(launches: list[Launch]) -> list[Launch]:
    """Launches of the same machine code are compiled once."""
    return list({(launch.kernel, *launch.constants.items()): launch for launch in launches}.values())


def leaf(*shape: int) -> Tensor:
    return torch.zeros(*shape, requires_grad=True)


def flags(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.bool)


def run_gated_recurrence(size: int) -> list[Tensor]:
    states = leaf(2, size)
    return [gated_recurrence.gated_recurrence_triton(leaf(3, 2, 3 * size), leaf(size), states, flags(3, 2), states)]


def run_linear_scan(size: int) -> list[Tensor]:
    states = leaf(2, size)
    return [linear_scan.linear_scan_triton(leaf(3, 2, size), leaf(3, 2, size), states, flags(3, 2), states)]


def run_group_norm(size: int) -> list[Tensor]:
    return [group_norm.group_norm_triton(leaf(3, size), scales, 16, 1e-4) for scales in (None, torch.ones(size))]


def run_advantage(_: int) -> list[Tensor]:
    x = torch.zeros(2, 3)
    linear_scan.generalized_advantage_triton(x, x, x, flags(2, 3), flags(2, 3), 0.99, 0.95)
    return []


def run_gru(size: int) -> list[Tensor]:
    state = leaf(2, size)
    return [gru.gru_triton(leaf(3, 2, 3 * size), leaf(3 * size, size), leaf(3 * size), state, flags(3, 2), state)]


def run_lstm(size: int) -> list[Tensor]:
    state = leaf(2, size)
    arguments = (leaf(3, 2, 4 * size), leaf(4 * size, size), state, state, flags(3, 2), state, state)
    return list(lstm.lstm_triton(*arguments))


def run_selective_scan(size: int) -> list[Tensor]:
    state, pair = leaf(2, size, 16), leaf(3, 2, 16)
    arguments = (leaf(3, 2, size), leaf(3, 2, size), leaf(size, 16), pair, pair, state, flags(3, 2), state)
    return list(selective_scan.selective_scan_triton(*arguments))


def run_ssd_scan(size: int) -> list[Tensor]:
    heads, state, pair = size // 8, leaf(2, size // 8, 8, 16), leaf(3, 2, 16)
    arguments = (leaf(3, 2, heads, 8), leaf(3, 2, heads), leaf(heads), pair, pair, state, flags(3, 2), state)
    return list(selective_scan.ssd_scan_triton(*arguments))


def run_causal_conv(size: int) -> list[Tensor]:
    state, bias = leaf(2, size, 4), leaf(size)
    return list(causal_conv.causal_conv_triton(leaf(3, 2, size), leaf(size, 4), bias, state, flags(3, 2), state))


def run_gated_readout(size: int) -> list[Tensor]:
    rows = leaf(3, 2, size)
    return [gated_readout.gated_readout_triton(rows, rows, rows, leaf(size), torch.ones(size), 16, 1e-4)]


CASES = [
    (run_gated_recurrence, 128),
    (run_linear_scan, 128),
    (run_group_norm, 128),
    (run_group_norm, 96),
    (run_advantage, 1),
    (run_gru, 64),
    (run_gru, 128),
    (run_gru, 48),
    (run_lstm, 64),
    (run_lstm, 128),
    (run_selective_scan, 128),
    (run_ssd_scan, 128),
    (run_causal_conv, 128),
    (run_gated_readout, 128),
]


TIERS = [(run_gru, 128), (run_lstm, 64), (run_lstm, 128)]
"""Cases whose path or fit depends on the GPU's shared memory."""


def cases() -> list[Any]:
    """All cases on an H100, and those that depend on shared memory on the others. The rest is slow."""
    every = [(run, size, capability) for run, size in CASES for capability in SHARED_MEMORY]
    return [
        pytest.param(
            *case,
            id=f"{case[0].__name__}-{case[1]}-{case[2]}",
            marks=[] if case[2] == 90 or case[:2] in TIERS else pytest.mark.slow,
        )
        for case in every
    ]


@pytest.mark.parametrize(("run", "size", "capability"), cases())
def test_kernels_fit(
    launches: list[Launch],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    run: Callable[[int], list[Tensor]],
    size: int,
    capability: int,
) -> None:
    monkeypatch.setattr(resident, "shared_memory", lambda _: SHARED_MEMORY[capability])
    if capability == 90:
        with torch.no_grad():
            run(size)
    torch.stack([output.sum() for output in run(size)] or [leaf(1).sum()]).sum().backward()
    assert launches
    for launch in distinct(launches):
        assert_fits(launch, capability, tmp_path)


@triton.jit
def bad_kernel(x, out, N: tl.constexpr, PRECISION: tl.constexpr, IS_ATOMIC: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    matrix = tl.load(x + at)
    product = tl.dot(matrix, matrix, input_precision=PRECISION)
    if IS_ATOMIC:
        tl.atomic_add(out + at, product)
    else:
        tl.store(out + at, product)


@pytest.mark.parametrize(
    ("size", "precision", "is_atomic", "warps", "failure"),
    [
        (16, "tf32", False, 4, "tf32"),
        (16, "ieee", True, 4, "atom"),
        (32, "ieee", False, 1, "STACK"),
        (16, "ieee", False, 4, "shared"),
    ],
)
def test_the_check_can_fail(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    size: int,
    precision: str,
    is_atomic: bool,
    warps: int,
    failure: str,
) -> None:
    if failure == "shared":
        monkeypatch.setitem(SHARED_MEMORY, 90, 16)
    constants = {"N": size, "PRECISION": precision, "IS_ATOMIC": is_atomic, "num_warps": warps}
    if failure == "STACK":
        constants["maxnreg"] = 32
    with pytest.raises(AssertionError, match=failure):
        assert_fits(Launch(bad_kernel, (torch.zeros(1), torch.zeros(1)), constants), 90, tmp_path)
