"""torch.compile(q, backend="octav", options={"backward": "bfloat16"}): same forward, gradients within rounding."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx

pytestmark = pytest.mark.compile


class Net(nn.Module):
    """Convolutions with and without a bias, one of them depthwise, batch norm, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.apart, self.last = nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.head(self.last(self.apart(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("integer", ["off", "auto"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_losses_and_gradients(integer: str) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(8, 3, 12, 12), torch.randint(0, 10, (8,))
    q = octav_fx.quantize(Net(), x)
    same = copy.deepcopy(q)
    half = torch.compile(q, backend="octav", options={"integer": integer, "backward": "bfloat16"})
    full = torch.compile(same, backend="octav", options={"integer": integer})
    losses = [F.cross_entropy(forward(x), target) for forward in (half, full)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, found), expected in zip(q.named_parameters(), same.parameters(), strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        error = (found.grad - expected.grad).norm()
        # Each layer rounds a gradient twice, by 2**-8 of it at most, and there are four.
        assert error <= 8 * 2**-8 * expected.grad.norm(), name
        # The head's gradients come first: that of its bias is a sum.
        assert (error > 0) == (name != "head.bias")
