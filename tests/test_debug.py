"""check_finite: the first operand that is not finite, in the order of execution."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import octav_fx
from octav_fx.debug import NotFinite, check_finite, first_not_finite


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        # Not in the order in which they are called.
        self.last = nn.Linear(8, 4)
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        h = self.norm(self.first(x))
        return self.last(F.relu(h @ h.T @ h))


def nets():
    net = Net()
    return {"float": net, "4 bits": octav_fx.quantize(net, torch.randn(5, 8))}


@pytest.mark.parametrize("name", ["float", "4 bits"])
def test_finite_is_let_through(name):
    net = nets()[name]
    x = torch.randn(5, 8)
    check_finite(net(x).sum(), net, x)
    assert first_not_finite(net, x) is None


@pytest.mark.parametrize("name", ["float", "4 bits"])
@pytest.mark.parametrize("poison", ["first", "last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight(name, poison, value):
    net = nets()[name]
    with torch.no_grad():
        net.get_parameter(f"{poison}.weight")[1, 1] = value
    x = torch.randn(5, 8)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(NotFinite, match=rf"{poison}, operand weight \[\d, 8\]"):
        check_finite(torch.tensor(value), net, x)
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[key]) or not tensor.isfinite().all()


@pytest.mark.parametrize("name", ["float", "4 bits"])
def test_the_input(name):
    net = nets()[name]
    x = torch.randn(5, 8)
    x[2, 3] = torch.inf
    assert first_not_finite(net, x) == "first, operand input [5, 8]"


def test_a_product_is_seen_at_the_next_operand():
    net = nets()["4 bits"]
    with torch.no_grad():
        net.norm.weight.fill_(1e25)
    # h @ h.T overflows: the first operand that is not finite is the left one of the second product.
    assert first_not_finite(net, torch.randn(5, 8)) == "matmul:1, operand input [5, 5]"


def test_a_loss_that_overflows_by_itself():
    net = nets()["4 bits"]
    with pytest.raises(NotFinite, match="every operand is finite"):
        check_finite(torch.tensor(torch.inf), net, torch.randn(5, 8))
