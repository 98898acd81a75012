"""make_activations_static: activations are rounded with a scale that is known."""

import copy

import torch
from torch import nn

from octav_fx.ir.printer import graph_text
from octav_fx.nn import FakeQuantizer, StaticQuantizer
from octav_fx.passes import make_activations_static
from tests.support.deployable import frozen, same
from tests.support.graphs import model
from tests.support.passes import made


def test_the_graph_stays_and_the_values_too():
    q = frozen(model(lambda self, x: x @ x.relu().t()), x := torch.randn(4, 3))
    before, text = copy.deepcopy(q), graph_text(q.graph)
    assert len(made(q, make_activations_static)) == 2
    assert graph_text(q.graph) == text
    assert [m.signed for m in q.modules() if isinstance(m, StaticQuantizer)] == [True, False]
    # Beyond the clips as well.
    for scale in (1, 10, 1e-6):
        assert same(q, before, scale * x)
    assert made(q, make_activations_static) == []


def test_what_is_not_frozen_stays():
    q = frozen(nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3))
    for part in q.modules():
        if isinstance(part, FakeQuantizer):
            part.clip = None
    assert made(q, make_activations_static) == []


def test_a_clip_of_zero_sends_all_to_zero_and_nan_stays():
    quantizer = StaticQuantizer(torch.tensor(0.0), 4, True, None)
    assert quantizer(torch.tensor([1e30, -1.0, 0.0])).tolist() == [0, 0, 0]
    assert quantizer(torch.tensor([torch.nan])).isnan().all()
