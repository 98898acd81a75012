"""pack_weights: integers in place of the weights that the state alone decides."""

import copy

import pytest
import torch
from torch import nn

from octav_fx.errors import OctavError
from octav_fx.ir.printer import graph_text
from octav_fx.nn import FakeQuantizer, IntegerWeight
from octav_fx.passes import pack_weights
from tests.support.deployable import frozen, same
from tests.support.graphs import model, parameter
from tests.support.passes import made


def test_weights_become_codes_and_go():
    x = torch.randn(2, 3)
    q = frozen(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), x)
    before = copy.deepcopy(q)
    assert [edit.node for edit in made(q, pack_weights)] == ["quantizers.0_weight", "quantizers.2_weight"]
    assert (
        graph_text(q.graph)
        == """\
_0_bias = self.0.bias
quantizers_0_input = self.quantizers.0_input(input_1)
quantizers_0_weight = self.quantizers.0_weight()
_0 = linear(quantizers_0_input, quantizers_0_weight, _0_bias)
_1 = self.1(_0)
_2_bias = self.2.bias
quantizers_2_input = self.quantizers.2_input(_1)
quantizers_2_weight = self.quantizers.2_weight()
_2 = linear(quantizers_2_input, quantizers_2_weight, _2_bias)
return _2"""
    )
    assert same(q, before, x)
    assert made(q, pack_weights) == []


def test_a_weight_that_is_computed_from_parameters():
    q = frozen(model(lambda self, x: x @ (self.w * 2).t(), w=parameter(5, 3)), x := torch.randn(2, 3))
    before = copy.deepcopy(q)
    (edit,) = made(q, pack_weights)
    stored = q.get_submodule(edit.node)
    assert isinstance(stored, IntegerWeight)
    assert stored.shape == (3, 5)
    assert not q.graph.find_nodes(op="get_attr")
    computed = (before.w * 2).t()
    assert torch.equal(stored(), before.get_submodule(edit.node)(computed))
    # It lies otherwise in memory than what was computed, and a BLAS may add the three products in another order.
    bound = 3 * torch.finfo(torch.float32).eps * (x.abs() @ computed.abs()).max()
    with torch.no_grad():
        assert (q.simulated_forward(x) - before.simulated_forward(x)).abs().max() <= bound


def test_a_weight_with_another_reader_stays_for_it():
    q = frozen(model(lambda self, x: x @ self.w + self.w.sum(), w=parameter(3, 5)), x := torch.randn(2, 3))
    before = copy.deepcopy(q)
    assert len(made(q, pack_weights)) == 1
    assert [node.target for node in q.graph.find_nodes(op="get_attr")] == ["w"]
    assert same(q, before, x)


def test_state_that_the_model_writes_and_weights_of_the_inputs_stay_dynamic():
    def forward(self, x):
        self.memory.mul_(0.5)
        return x @ self.memory + x @ self.w.expand(x.shape[0], 3, 5)[0]

    q = frozen(model(forward, memory=torch.randn(3, 5), w=parameter(3, 5)), torch.randn(2, 3))
    assert made(q, pack_weights) == []
    assert len([m for m in q.modules() if isinstance(m, FakeQuantizer)]) == 3


def test_inf_in_a_weight_is_an_error():
    q = frozen(nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3))
    with torch.no_grad():
        q.get_submodule("0").weight[1, 1] = torch.nan
    with pytest.raises(OctavError, match=r"quantizers\.0_weight: the weight _0_weight holds inf or NaN"):
        made(q, pack_weights)
