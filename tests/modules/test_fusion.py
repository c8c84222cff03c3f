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
