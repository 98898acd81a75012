"""Transforms of torch.func: the gradients are those of autograd, each sample has its own clips, no hint is written."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import octav_fx
from octav_fx.errors import OctavError
from tests.support.alike import TOLERANCE, assert_close, silent_quantizers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def loss(q: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(q, parameters, (x,)).square().sum()


def by_autograd(q: nn.Module, x: Tensor) -> dict[str, Tensor]:
    q.zero_grad()
    loss(q, dict(q.named_parameters()), x).backward()
    return {name: p.grad for name, p in q.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gradient", ["pwl", "mad", "ste"])
@pytest.mark.parametrize("bits", [4, 8])
def test_grad(gradient: str, bits: int) -> None:
    x = torch.randn(4, 8)
    config = octav_fx.Config(weight_bits=bits, activation_bits=bits, weight_gradient=gradient)
    q: Any = octav_fx.quantize(Net(), x, config)
    hints = {name: value.clone() for name, value in q.named_buffers()}
    found = torch.func.grad(lambda parameters: loss(q, parameters, 9 * x))(dict(q.named_parameters()))
    assert all(torch.equal(value, hints[name]) for name, value in q.named_buffers())
    for name, expected in by_autograd(q, 9 * x).items():
        assert torch.equal(found[name], expected)


def test_gradients_of_samples() -> None:
    x = torch.randn(4, 8)
    q = octav_fx.quantize(Net(), x)
    parameters = dict(q.named_parameters())
    of_one = torch.func.grad(lambda parameters, x: loss(q, parameters, x))
    found = torch.func.vmap(of_one, (None, 0))(parameters, x[:, None])
    for at in range(len(x)):
        for name, expected in by_autograd(q, x[at : at + 1]).items():
            torch.testing.assert_close(
                found[name][at], expected, rtol=0, atol=TOLERANCE * (1 + float(expected.abs().max()))
            )


def test_without_quantizers_they_are_those_of_the_float_model() -> None:
    x, model = torch.randn(4, 8), Net()
    q = octav_fx.quantize(model, x)
    with silent_quantizers():
        found = torch.func.grad(lambda parameters: loss(q, parameters, x))(dict(q.named_parameters()))
    for name, expected in by_autograd(model, x).items():
        assert_close(name, found[name], expected)


def test_a_second_derivative() -> None:
    x = torch.randn(4, 8)
    q = octav_fx.quantize(Net().eval(), x)

    def slope(x: Tensor) -> Tensor:
        return torch.func.grad(lambda z: q(z).square().sum())(x).square().sum()

    z = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(q(z).square().sum(), z, create_graph=True)
    assert torch.equal(torch.func.grad(slope)(x), torch.autograd.grad(first.square().sum(), z)[0])


def test_vmap_gives_every_sample_its_clips() -> None:
    x = torch.randn(3, 4, 8)
    x[1] *= 100
    q = octav_fx.quantize(Net().eval(), x[0])
    found = torch.func.vmap(q)(x)
    for at in range(len(x)):
        expected = q(x[at])
        torch.testing.assert_close(found[at], expected, rtol=0, atol=TOLERANCE * (1 + float(expected.abs().max())))


@pytest.mark.slow
def test_what_has_no_rule_is_refused() -> None:
    x = torch.randn(4, 8)
    q = octav_fx.quantize(Net(), x)
    with pytest.raises(OctavError, match="here Jvp run"):
        torch.func.jvp(q, (x,), (x,))
    # Ops without a rule for it would give results without a tangent, which reads as zero.
    with forward_ad.dual_level(), pytest.raises(OctavError, match="here Jvp run"):
        q(forward_ad.make_dual(x, x))
    learned = octav_fx.quantize(Net(), x, octav_fx.Config(clip="lsq"))
    with pytest.raises(OctavError, match="learned"):
        torch.func.grad(lambda x: learned(x).sum())(x)
