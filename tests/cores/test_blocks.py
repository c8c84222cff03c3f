"""`ffm` and `gated_delta` against their papers' formulas, written out."""

from __future__ import annotations

import cmath

import pytest
import torch
from torch.nn import functional as F

from cyborg_torchrl.cores import FFMBlock, GatedDeltaBlock
from cyborg_torchrl.cores.delta_rule import delta_rule, delta_rule_step


def test_ffm_is_a_sum_of_faded_and_turned_inputs() -> None:
    block = FFMBlock(4, trace_size=3, context_size=2, max_horizon=20).double()
    x = torch.randn(1, 9, 4, dtype=torch.float64)
    is_init = torch.zeros(1, 9, dtype=torch.bool)
    is_init[0, [0, 4]] = True
    with torch.no_grad():
        y, last = block(x, block.initial_state(1), is_init)
        rates, speeds = F.softplus(block.rate).tolist(), block.speed.tolist()
        for t in range(9):
            start = 0 if t < 4 else 4
            memory = torch.zeros(3, 2, 2, dtype=torch.float64)
            for s in range(start, t + 1):
                written = block.write(x[0, s]) * torch.sigmoid(block.write_gate(x[0, s]))
                for m in range(3):
                    for c in range(2):
                        factor = cmath.exp((-rates[m] - 1j * speeds[c]) * (t - s)) * written[m].item()
                        memory[m, c] += torch.tensor([factor.real, factor.imag], dtype=torch.float64)
            z = F.layer_norm(block.read(memory.flatten()), [4])
            gate = torch.sigmoid(block.output_gate(x[0, t]))
            expected = z * gate + block.skip(x[0, t]) * (1 - gate)
            torch.testing.assert_close(y[0, t], expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(last["memory"][0].flatten(), memory.flatten(), rtol=0, atol=1e-11)


def test_a_matrix_maps_keys_to_their_last_values() -> None:
    """With beta = 1, alpha = 1 and orthogonal keys the rule is a dictionary: a new value replaces the old one."""
    keys, values = torch.eye(4)[[0, 1, 0]], torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]])
    matrix = torch.zeros(1, 1, 4, 4)
    for k, v in zip(keys, values, strict=True):
        read, matrix = delta_rule_step(
            *(each.view(1, 1, 4) for each in (k, k, v)), *torch.tensor([[[1.0]], [[0.0]]]), matrix
        )
        torch.testing.assert_close(read.flatten(), v)
    torch.testing.assert_close(matrix[0, 0], torch.stack([values[2], values[1], torch.zeros(4), torch.zeros(4)]))


@pytest.mark.parametrize("steps", [1, 15, 16, 17, 50])
def test_chunks_equal_the_papers_recurrence(steps: int) -> None:
    """S_t = S_{t-1} alpha_t (I - beta_t k_t k_t^T) + beta_t v_t k_t^T and o_t = S_t q_t: equation 10 of the paper."""
    torch.manual_seed(steps)
    q, k, v = (torch.randn(2, steps, 3, 5, dtype=torch.float64) for _ in range(3))
    k = F.normalize(k, dim=-1)
    beta, log_alpha = torch.rand(2, steps, 3).double(), -torch.rand(2, steps, 3).double()
    start, is_init = torch.randn(2, 3, 5, 5).double(), torch.rand(2, steps) < 0.1
    reads, last = delta_rule(q, k, v, beta, log_alpha, start, is_init)
    for row in range(2):
        for head in range(3):
            state = start[row, head].t()
            for t in range(steps):
                if is_init[row, t]:
                    state = torch.zeros_like(state)
                k_t, v_t, b_t = k[row, t, head], v[row, t, head], beta[row, t, head]
                erase = torch.eye(5).double() - b_t * torch.outer(k_t, k_t)
                state = log_alpha[row, t, head].exp() * state @ erase + b_t * torch.outer(v_t, k_t)
                torch.testing.assert_close(reads[row, t, head], state @ q[row, t, head], rtol=0, atol=1e-11)
            torch.testing.assert_close(last[row, head], state.t(), rtol=0, atol=1e-11)


def test_options_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="num_heads must divide the width of 6; got 4"):
        GatedDeltaBlock(6)
    with pytest.raises(ValueError, match="trace_size must be >= 1; got 0"):
        FFMBlock(6, trace_size=0)
