"""The gated delta rule, in chunks of steps."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CHUNK = 16
"""Steps that are computed by one triangular system."""


def delta_rule_step(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B H D"],
    v: Float[Tensor, "B H D"],
    beta: Float[Tensor, "B H"],
    log_alpha: Float[Tensor, "B H"],
    matrix: Float[Tensor, "B H D D"],
) -> tuple[Float[Tensor, "B H D"], Float[Tensor, "B H D D"]]:
    """Take one step. Return what the query reads, and the next matrix; keys are its rows.

    S := alpha S;    S := S + k (beta (v - k S))^T;    read = q S
    """
    matrix = matrix * log_alpha.exp().unsqueeze(-1).unsqueeze(-1)
    old = (k.unsqueeze(-2) @ matrix).squeeze(-2)
    update = beta.unsqueeze(-1) * (v - old)
    matrix = matrix + k.unsqueeze(-1) * update.unsqueeze(-2)
    return (q.unsqueeze(-2) @ matrix).squeeze(-2), matrix


def delta_rule(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T H D"],
    v: Float[Tensor, "B T H D"],
    beta: Float[Tensor, "B T H"],
    log_alpha: Float[Tensor, "B T H"],
    matrix: Float[Tensor, "B H D D"],
    is_init: Bool[Tensor, "B T"],
) -> tuple[Float[Tensor, "B T H D"], Float[Tensor, "B H D D"]]:
    """Run a sequence. Return what the queries read, and the last matrix. Episodes begin with a matrix of zeros.

    Within a chunk the updates u_i = beta_i (v_i - k_i alpha_i S_{i-1}) solve a triangular system:

        u_i + beta_i sum_{j<i} decay(j, i) (k_i . k_j) u_j = beta_i (v_i - decay(0, i) k_i S_0)
        read_i = decay(0, i) q_i S_0 + sum_{j<=i} decay(j, i) (q_i . k_j) u_j

    where decay(j, i) is the product of alpha after step j up to step i, and 0 if an episode begins between them.

    Source: Yang et al. (2024), "Gated Delta Networks", section 3.3, without the explicit inverse.
    """
    reads: list[Tensor] = []
    parts = [each.transpose(1, 2).split(CHUNK, 2) for each in (q, k, v, beta, log_alpha)]
    for q_c, k_c, v_c, beta_c, log_c, init_c in zip(*parts, is_init.split(CHUNK, 1), strict=True):
        episode = init_c.cumsum(1).unsqueeze(1)  # [B, 1, C]: 0 continues that of the matrix
        is_same = (episode.unsqueeze(-1) == episode.unsqueeze(-2)).tril()
        # The sum from j to i, and not a difference of sums: these would cancel only up to rounding across a reset.
        steps = torch.ones(log_c.shape[-1], log_c.shape[-1], dtype=log_c.dtype, device=log_c.device)
        between = (log_c.unsqueeze(-2) * steps.tril()) @ steps.tril(-1)
        decay = torch.where(is_same, between, -torch.inf).exp()  # [B, H, C, C]
        from_start = log_c.cumsum(-1).exp() * (episode == 0)
        matrix = torch.where((episode == 0).any(-1)[..., None, None], matrix, 0.0)  # NaN does not pass
        rates = beta_c.unsqueeze(-1)
        system = rates * decay * (k_c @ k_c.transpose(-1, -2))  # its diagonal is not read
        known = rates * (v_c - from_start.unsqueeze(-1) * (k_c @ matrix))
        update = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
        weights = decay * (q_c @ k_c.transpose(-1, -2))
        reads.append(from_start.unsqueeze(-1) * (q_c @ matrix) + weights @ update)
        kept = k_c * decay[..., -1, :].unsqueeze(-1)
        matrix = from_start[..., -1, None, None] * matrix + kept.transpose(-1, -2) @ update
    return torch.cat(reads, 2).transpose(1, 2), matrix
