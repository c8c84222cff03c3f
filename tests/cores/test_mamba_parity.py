"""Mamba-1 and Mamba-2 against the official package's own pure-PyTorch code."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cyborg_torchrl.cores import Mamba2Block, MambaBlock, selective_scan, ssd_scan
from cyborg_torchrl.cores.abstract import Core, restart
from cyborg_torchrl.cores.kernels.official_mamba import ssd_scan_cuda

OUTPUT, GRADIENT = 1e-6, 1e-5
BATCH, STEPS, WIDTH = 3, 21, 32


def relative(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest entry or to one."""
    return ((a - b).abs().max() / max(1.0, b.abs().max())).item()


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    loss = sum((v * torch.randn(v.shape, generator=generator)).sum() for v in outputs)
    return torch.autograd.grad(loss, inputs)


def relative_gradient(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def official_steps(block, x: Tensor, is_init: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run `step` of the official block, and set its caches to zero where an episode begins."""
    rows = []
    with torch.no_grad():
        for x_t, flags in zip(x.unbind(1), is_init.unbind(1), strict=True):
            conv[flags], ssm[flags] = 0.0, 0.0
            y_t, conv, ssm = block.step(x_t.unsqueeze(1), conv, ssm)
            rows.append(y_t)
    return torch.cat(rows, 1), conv, ssm


def resets() -> Tensor:
    is_init = torch.rand(BATCH, STEPS) < 0.2
    is_init[0], is_init[1, 0], is_init[2, :5] = False, True, torch.tensor([False, True, True, False, True])
    return is_init


def test_the_scan_of_mamba_1_equals_the_official_reference(mamba_ssm) -> None:
    u, delta = torch.randn(2, STEPS, BATCH, WIDTH)
    b, c = torch.randn(2, STEPS, BATCH, 16)
    a, delta = -torch.arange(1.0, 17.0).repeat(WIDTH, 1), torch.exp(delta - 3)
    inputs = [x.requires_grad_() for x in (u, delta, a, b, c)]
    zero = torch.zeros(BATCH, WIDTH, 16)
    ours = selective_scan(*inputs, zero, torch.zeros(STEPS, BATCH, dtype=torch.bool), zero)
    last_first = [x if x.ndim == 2 else x.permute(1, 2, 0) for x in inputs]
    theirs = mamba_ssm.selective_scan_ref(*last_first, return_last_state=True)
    theirs = (theirs[0].permute(2, 0, 1), theirs[1])
    assert max(map(relative, ours, theirs)) <= OUTPUT
    assert max(map(relative_gradient, gradients(ours, inputs), gradients(theirs, inputs))) <= GRADIENT


@pytest.mark.parametrize("chunk", [4, 7, 16])
def test_the_scan_of_mamba_2_equals_the_official_listing(mamba_ssm, chunk: int) -> None:
    steps, heads, size, numbers = 28, 3, 8, 16
    u, h_0 = torch.randn(steps, BATCH, heads, size), torch.randn(BATCH, heads, size, numbers)
    delta, a = torch.exp(torch.randn(steps, BATCH, heads) - 2), -torch.exp(torch.randn(heads))
    b, c = torch.randn(2, steps, BATCH, numbers)
    inputs = [v.requires_grad_() for v in (u, delta, a, b, c, h_0)]
    ours = ssd_scan(*inputs, torch.zeros(steps, BATCH, dtype=torch.bool), torch.zeros_like(h_0), chunk)
    batch_first = [v.transpose(0, 1) for v in (u * delta.unsqueeze(-1), delta * a)]
    for_heads = [v.transpose(0, 1).unsqueeze(2).expand(-1, -1, heads, -1) for v in (b, c)]
    y, last = mamba_ssm.ssd_minimal_discrete(*batch_first, *for_heads, 4, h_0.unsqueeze(1))
    theirs = (y.transpose(0, 1), last)
    assert max(map(relative, ours, theirs)) <= OUTPUT
    assert max(map(relative_gradient, gradients(ours, inputs), gradients(theirs, inputs))) <= GRADIENT


def test_official_weights_of_mamba_1_load_and_compute_the_same(mamba_ssm) -> None:
    official = mamba_ssm.Mamba(WIDTH, d_state=8, use_fast_path=False)
    ours = MambaBlock(WIDTH, d_state=8, official=True)
    ours.load_state_dict(official.state_dict(), strict=True)
    official.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(BATCH, STEPS, WIDTH, requires_grad=True)
    y, _ = ours(x, ours.initial_state(BATCH), torch.zeros(BATCH, STEPS, dtype=torch.bool))
    expected = official(x)
    assert relative(y, expected) <= OUTPUT
    names = dict(ours.named_parameters())
    grads = gradients((y,), [x, *names.values()])
    theirs = gradients((expected,), [x, *(dict(official.named_parameters())[name] for name in names)])
    assert max(map(relative_gradient, grads, theirs)) <= GRADIENT


def build_mamba_1(mamba_ssm):
    return mamba_ssm.Mamba(WIDTH, d_state=8), MambaBlock(WIDTH, d_state=8, official=True)


def build_mamba_2(mamba_ssm):
    return mamba_ssm.Mamba2(WIDTH, d_state=8, headdim=16), Mamba2Block(WIDTH, d_state=8, headdim=16, official=True)


@pytest.mark.parametrize("build", [build_mamba_1, build_mamba_2])
def test_streaming_with_stored_states_and_resets_equals_the_official_step(mamba_ssm, build: Callable) -> None:
    official, ours = build(mamba_ssm)
    ours.load_state_dict(official.state_dict(), strict=True)
    x, is_init = torch.randn(BATCH, STEPS, WIDTH), resets()
    state = {name: torch.randn(BATCH, *shape) for name, shape in ours.state_shapes.items()}
    conv, ssm = (state[name].clone() for name in ("mamba_conv", "mamba_ssm"))
    expected, conv, ssm = official_steps(official, x, is_init, conv, ssm)
    with torch.no_grad():
        y, last = ours(x, state, is_init)
        stepped, state = by_steps(ours, x, state, is_init)
    for output, end in ((y, last), (stepped, state)):
        assert relative(output, expected) <= OUTPUT
        assert relative(end["mamba_ssm"], ssm) <= OUTPUT
        assert torch.allclose(end["mamba_conv"], conv, rtol=0, atol=OUTPUT)


def by_steps(core: Core, x: Tensor, state: dict[str, Tensor], is_init: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    rows = []
    for x_t, flags in zip(x.unbind(1), is_init.unbind(1), strict=True):
        y_t, state = core.step(x_t, restart(state, core.initial_state(BATCH), flags))
        rows.append(y_t)
    return torch.stack(rows, 1), state


@pytest.mark.parametrize("block", [MambaBlock, Mamba2Block])
def test_without_official_weights_a_blank_step_writes_and_outputs_nothing(block: type[Core]) -> None:
    core = block(WIDTH)
    blank = torch.zeros(BATCH, WIDTH)
    y, state = core.step(blank, core.initial_state(BATCH))
    assert (y == 0).all()
    assert all((value == 0).all() for value in state.values())


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="opt-in: TRITON_INTERPRET=1, with triton")
def test_the_triton_kernels_of_mamba_2_equal_our_scan(triton_ssd: Callable) -> None:
    """The official kernels themselves, run by Triton's interpreter, with a stored state and a reset.

    Run it in a separate process: TRITON_INTERPRET=1 pytest tests/cores/test_mamba_parity.py -m slow -k triton
    """
    steps, heads, size, numbers = 70, 2, 16, 16
    u, h_0 = torch.randn(steps, BATCH, heads, size), torch.randn(BATCH, heads, size, numbers)
    delta, a = torch.exp(torch.randn(steps, BATCH, heads) - 2), -torch.exp(torch.randn(heads))
    b, c = torch.randn(2, steps, BATCH, numbers)
    is_init = torch.rand(steps, BATCH) < 0.1
    is_init[0] = False
    is_init[0, 0] = True
    zero = torch.zeros_like(h_0)
    inputs = [v.requires_grad_() for v in (u, delta, a, b, c, h_0)]
    ours = ssd_scan(*inputs, is_init, zero)
    theirs = ssd_scan_cuda(*inputs, is_init, zero, triton_ssd)
    assert max(map(relative, ours, theirs)) <= 1e-6
    assert max(map(relative_gradient, gradients(ours, inputs), gradients(theirs, inputs))) <= 1e-5
