"""Methods besides forward that multiply tensors say that they do so in float."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx


def product(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


class Net(nn.Module):
    def __init__(self, in_parts: bool) -> None:
        super().__init__()
        self.in_parts, self.w, self.linear, self.mm = in_parts, nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8), None

    def inside(self, x: Tensor) -> Tensor:
        return x @ self.w

    def by_name(self, x: Tensor) -> Tensor:
        return self.w.mm(x)

    def by_a_function(self, x: Tensor) -> Tensor:
        return product(x, self.w)

    def nested(self, x: Tensor) -> Tensor:
        return (lambda y: torch.einsum("ij,jk->ik", y, self.w))(x)

    def by_another(self, x: Tensor) -> Tensor:
        return self.inside(x)

    def by_layer(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def unlike(self, x: Tensor) -> Any:
        return self.mm, x.T

    def forward(self, x: Tensor) -> Tensor:
        if self.in_parts and x.sum() > 1e9:
            return x
        return self.linear(self.inside(x))


def said(call: Any, x: Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        call(x)
    return [str(each.message).partition(" multiplies")[0] for each in given]


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_product_in_a_method_is_said_once(in_parts: bool) -> None:
    model, x = Net(in_parts).eval(), torch.randn(8, 8)
    q = octav_fx.quantize(model, x)
    assert said(q, x) == said(q.forward, x) == said(q.unlike, x) == []
    for name in ("by_name", "by_a_function", "nested", "inside"):
        method = getattr(q, name)
        with octav_fx.float_mode(q):
            assert said(method, x) == []
        assert said(method, x) == [f"Net.{name}"] and said(method, x) == []
        assert torch.equal(method(x), getattr(model, name)(x))
    assert said(q.by_another, x) == []
    if in_parts:
        # A quantized layer.
        assert said(q.by_layer, x) == []


@pytest.mark.compile
def test_compiled_nothing_is_said_and_nothing_broken() -> None:
    q, x = octav_fx.quantize(Net(in_parts=True).eval(), torch.randn(8, 8)), torch.randn(8, 8)
    method = torch.compile(q.inside, backend="eager", fullgraph=True)
    assert said(method, x) == [] and torch.equal(method(x), x @ q.w)
