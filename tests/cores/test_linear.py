"""The linear map for long sequences, against torch's in double precision."""

import pytest
import torch
from torch.nn import functional as F

from cyborg_torchrl.cores.kernels import linear as module
from cyborg_torchrl.cores.kernels.linear import linear


@pytest.fixture(autouse=True)
def any_processor(monkeypatch):
    """Take oneDNN's path on every processor."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(module, "_is_faster_here", lambda: True)


def gradients(function, *tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    result = function(*leaves)
    weights = torch.linspace(0.5, 1, result.numel(), dtype=result.dtype).view_as(result)
    return [result.detach(), *torch.autograd.grad((result * weights).mean(), leaves)]


@pytest.mark.parametrize("features", [6, 128])
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_torch_with_gradients(features, has_bias):
    torch.manual_seed(0)
    tensors = [torch.randn(700, 16, features), torch.randn(384, features), torch.randn(384)][: 3 if has_bias else 2]
    assert tensors[0].numel() * 384 >= module.MIN_PRODUCTS
    expected = gradients(F.linear, *[tensor.double() for tensor in tensors])
    for ours, reference in zip(gradients(linear, *tensors), expected, strict=True):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))


def test_observations_need_no_gradient():
    x, weight = torch.randn(700, 16, 128), torch.randn(384, 128, requires_grad=True)
    y = linear(x, weight)
    assert type(y.grad_fn).__name__ == "_OneDNNLinearBackward"
    y.sum().backward()
    torch.testing.assert_close(weight.grad, x.sum((0, 1)).expand(384, 128), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_take_torchs_path(dtype):
    x, weight = torch.randn(700, 16, 128, dtype=dtype), torch.randn(384, 128, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_autocast_is_kept():
    x, weight = torch.randn(700, 16, 128), torch.randn(384, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype is torch.bfloat16


def test_exports_with_any_number_of_rows():
    class Map(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(384, 128))

        def forward(self, x):
            return linear(x, self.weight)

    rows = {0: torch.export.Dim("rows")}
    program = torch.export.export(Map(), (torch.randn(4, 128),), dynamic_shapes=(rows,)).module()
    assert [tuple(program(torch.zeros(count, 128)).shape) for count in (1, 200, 5000)] == [
        (1, 384),
        (200, 384),
        (5000, 384),
    ]
