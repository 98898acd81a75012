"""products_as_linear: products with stored matrices are linear layers, whose codes are multiplied."""

import copy

import pytest
import torch
from torch import nn

import octav_fx
from octav_fx.deploy.convert import integer_layers, rewritten
from octav_fx.ir.printer import graph_text
from octav_fx.passes import CONVERT, products_as_linear
from tests.support.deployable import FOUR, frozen
from tests.support.graphs import model
from tests.support.passes import made

BEFORE = CONVERT[: CONVERT.index(products_as_linear)]


class Conv1D(nn.Module):
    """Products as GPT-2 spells them: [in, out] weights."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.randn(9))
        self.last = nn.Parameter(torch.randn(9, 4))

    def forward(self, x):
        y = torch.addmm(self.bias, x.view(-1, 6), self.weight).view(*x.shape[:-1], 9)
        return y.relu() @ self.last


def test_gpt2s_layers_multiply_codes():
    x = torch.randn(2, 5, 6)
    q = frozen(Conv1D(), x)
    c = rewritten(q, BEFORE)
    before = copy.deepcopy(c)
    assert [edit.node for edit in made(c, products_as_linear)] == [
        "quantizers.addmm_mat2",
        "quantizers.matmul_other",
    ]
    text = graph_text(c.graph)
    assert "linear = linear(quantizers_addmm_mat1, quantizers_addmm_mat2, bias)" in text
    assert "linear_1 = linear(quantizers_matmul_input, quantizers_matmul_other, None)" in text
    weight = c.get_submodule("quantizers.addmm_mat2")
    assert weight.shape == (9, 6) and weight.dim == 0
    assert torch.equal(weight(), before.get_submodule("quantizers.addmm_mat2")().t())
    # The order of a sum of six products, and of nine.
    assert torch.allclose(c(x), before(x), rtol=0, atol=1e-5)
    assert made(c, products_as_linear) == []
    converted = octav_fx.convert(q)
    assert [reason for _, reason in integer_layers(converted)] == [None, None]
    assert torch.equal(octav_fx.convert(q, integers=False)(x), q(x))
    assert torch.allclose(converted(x), q(x), rtol=0, atol=1e-5)


def _stored(shape=(6, 9)):
    return {"weight": torch.randn(shape), "bias": torch.randn(9), "row": torch.randn(1, 9)}


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda s, x: torch.addmm(s.bias, x, s.weight, beta=2), "it has factors"),
        (lambda s, x: torch.addmm(s.bias, x, s.weight, alpha=2), "it has factors"),
        (lambda s, x: torch.addmm(s.row, x, s.weight), "what it adds is no constant of each column"),
        (lambda s, x: torch.addmm(x.sum(0)[:1], x, s.weight), "what it adds is no constant of each column"),
        (lambda s, x: x @ s.weight + (x * 2) @ s.weight, "its weight has other readers"),
    ],
)
def test_other_products_stay(forward, reason):
    x = torch.randn(3, 6)
    q = frozen(model(forward, **_stored()), x)
    edits = products_as_linear(rewritten(q, BEFORE))
    assert {edit.detail for edit in edits} == {f"not a linear layer: {reason}"}
    # The order of a sum of six products.
    assert torch.allclose(octav_fx.convert(q)(x), q(x), rtol=0, atol=1e-5)


def test_stacks_of_matrices_stay():
    x = torch.randn(3, 2, 6)
    q = octav_fx.quantize(model(lambda s, x: x @ s.weight, weight=torch.randn(3, 6, 9)), x, FOUR)
    octav_fx.freeze(octav_fx.calibrate(q.eval(), [x]))
    (edit,) = products_as_linear(rewritten(q, BEFORE))
    assert edit.detail == "not a linear layer: no matrix with scales of its columns"
    assert torch.allclose(octav_fx.convert(q)(x), q(x), rtol=0, atol=1e-5)
