"""Where past and present meet, against the formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cyborg_torchrl.modules.fusion import PastPresentFusion


@pytest.mark.parametrize(("present_features", "memory_features"), [(5, 5), (3, 5)])
def test_a_gate_multiplies_the_past(present_features: int, memory_features: int) -> None:
    fusion = PastPresentFusion(present_features, memory_features, is_gated=True)
    present, memory = torch.randn(4, present_features), torch.randn(4, memory_features)
    plain = PastPresentFusion(present_features, memory_features)
    plain.load_state_dict({name: value for name, value in fusion.state_dict().items() if not name.startswith("gate")})
    torch.testing.assert_close(fusion(present, memory), plain(present, memory), msg="the gate is open at the start")
    torch.nn.init.normal_(fusion.gate.weight)
    past, now = F.layer_norm(memory, [memory_features]), F.layer_norm(present, [present_features])
    expected = (1 + now @ fusion.gate.weight.t()) * past + fusion.project(now)
    torch.testing.assert_close(fusion(present, memory), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [5, 16, 33, 128])
def test_a_step_while_acting_is_the_sum_of_two_layer_norms(features: int, dtype: torch.dtype) -> None:
    fusion = PastPresentFusion(features, features).to(dtype)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter)
    present, memory = 3.0 + torch.randn(7, features, dtype=dtype), 1e-3 * torch.randn(7, 2 * features, dtype=dtype)
    memory = memory[:, ::2]  # not contiguous
    expected = sum(
        F.layer_norm(x.double(), [features], norm.weight.double(), norm.bias.double())
        for x, norm in ((memory, fusion.past), (present, fusion.present))
    )
    with torch.no_grad():
        acting = fusion(present, memory)
    training = fusion(present, memory)
    assert training.requires_grad
    tolerance = 1e-12 if dtype is torch.float64 else 2e-5
    for joint in (acting, training):
        torch.testing.assert_close(joint.double(), expected, rtol=tolerance, atol=tolerance)
