"""observe: running a model once leaves no trace but the hints; comparing two results."""

import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import octav_fx
from octav_fx.graph.observe import difference, has_data, run_once, without_quantizers
from tests.graph.support import model


def test_statistics_random_state_and_inputs_are_as_before() -> None:
    def forward(self, x):
        return self.drop(self.bn(self.fc(x.mul_(2))))

    float_module = model(forward, fc=nn.Linear(4, 3), bn=nn.BatchNorm1d(3), drop=nn.Dropout()).train()
    x = torch.randn(5, 4)
    q = octav_fx.quantize(float_module, x)
    before, state, random = x.clone(), {k: v.clone() for k, v in q.state_dict().items()}, torch.get_rng_state()
    hint = q.quantizers.fc_input.hint.clone()
    run_once(q, (x * 10,), {})
    run_once(q, (x,), {})
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(q.state_dict()[key], value) for key, value in state.items())
    run_once(q, (), {"x": x * 10})
    assert q.quantizers.fc_input.hint > hint


def test_statistics_are_as_before_after_an_error() -> None:
    def forward(self, x):
        self.bn(x)
        raise ValueError

    float_module = model(forward, bn=nn.BatchNorm1d(3)).train()
    with pytest.raises(ValueError):
        run_once(float_module, (torch.randn(5, 3),), {})
    assert torch.equal(float_module.bn.running_mean, torch.zeros(3)) and float_module.bn.num_batches_tracked == 0


def test_no_gradients_are_recorded() -> None:
    assert not run_once(nn.Linear(2, 2), (torch.randn(1, 2),), {}).requires_grad


def test_has_data() -> None:
    x = torch.randn(1, 2)
    assert has_data(nn.Linear(2, 2), ((x,), {}))
    assert not has_data(nn.Linear(2, 2, device="meta"), ((x,), {}))
    assert not has_data(nn.Linear(2, 2), ((), {"x": [x.to("meta")]}))


def test_without_quantizers_the_graph_is_float_and_with_them_again_it_is_not() -> None:
    float_module, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    q = octav_fx.quantize(float_module, x)
    quantized = q(x)
    hint = q.get_submodule("quantizers.0_input").hint.clone()
    with pytest.raises(ValueError), without_quantizers(q):
        assert torch.equal(q(x * 3), float_module(x * 3))
        raise ValueError
    assert torch.equal(q(x), quantized) and not torch.equal(quantized, float_module(x))
    assert torch.equal(q.get_submodule("quantizers.0_input").hint, hint)


class Pair(NamedTuple):
    a: Any
    b: Any


X = torch.tensor([1.0, float("nan"), float("inf")])


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        (X, X.clone()),
        ([X, {"a": 1}], [X, {"a": 1}]),
        (Pair(X, None), Pair(X, None)),
        # Rounding.
        (torch.ones(3), torch.ones(3) * (1 + 1e-5)),
        (torch.zeros(3), torch.zeros(3)),
    ],
)
def test_no_difference(expected: Any, found: Any) -> None:
    assert difference(expected, found) is None


@pytest.mark.parametrize(
    ("expected", "found", "words"),
    [
        (torch.ones(3), torch.ones(3) * 1.5, r"its result of shape \(3,\) is off by 50\.0%"),
        (torch.ones(3), torch.ones(4), r"it returns torch.float32 \(4,\) instead of torch.float32 \(3,\)"),
        (torch.ones(3), torch.ones(3).double(), r"torch.float64 \(3,\) instead of torch.float32 \(3,\)"),
        ([X], (X,), "instead of"),
        ([X], [X, X], "instead of"),
        ({"a": X}, {"b": X}, "instead of"),
        (None, 1, "instead of"),
        (torch.ones(3), 1.0, "instead of"),
    ],
)
def test_a_difference_is_named(expected: Any, found: Any, words: str) -> None:
    assert re.search(words, difference(expected, found))
