"""Floats on modules that change from call to call, as a schedule changes them: one graph reads each of their values."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import octav_fx
from octav_fx import Config
from octav_fx.capture.modules import graphs_of
from octav_fx.capture.rerun import without_quantizers
from tests.support.alike import silent_quantizers


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.u = nn.Linear(4, 4), 0.25

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) / (self.u + 1)


class Net(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.b, self.t, self.own = Inner(), nn.Linear(4, 4), 0.5, forward

    def forward(self, x: Tensor) -> Any:
        return self.own(self, x)


def used(s: Any, x: Tensor) -> Tensor:
    return s.b(s.inner(x) * s.t * 0.5 + torch.full_like(x, s.t)) * (2 if isinstance(s.t, float) else 100)


def branching(s: Any, x: Tensor) -> Tensor:
    return s.b(s.inner(x)) * s.t if s.t > 0.3 else s.b(x) / s.t


def returned(s: Any, x: Tensor) -> Tensor:
    return s.b(s.inner(x)), {"t": s.t, "next": s.t * 0.9}  # type: ignore[return-value]


def texts(s: Any, x: Tensor) -> Tensor:
    return s.b(s.inner(x)) * len(f"{s.t}")


def set_to(model: Any, k: int) -> None:
    model.t, model.inner.u = 0.5 * 0.9**k, 0.25 * 0.8**k


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("forward", "most"), [(used, 2), (branching, 3), (returned, 2)])
def test_one_graph_is_for_all_values(forward: Any, most: int, training: bool) -> None:
    model, x = Net(forward).train(training), torch.randn(3, 4)
    q = octav_fx.quantize(model, x)
    for k in range(12):
        set_to(model, k), set_to(q, k)
        with without_quantizers(q):
            torch.testing.assert_close(q(x), model(x))
    assert len(graphs_of(q).graphs_of(training)) == most
    torch.compiler.reset()
    count = CompileCounter()
    call = torch.compile(q, backend=count)
    for k in range(12):
        set_to(q, k)
        torch.testing.assert_close(call(x), q(x))
    assert count.frame_count <= most


def test_what_no_graph_reads_has_a_graph_for_each_value() -> None:
    model, x = Net(texts).eval(), torch.randn(3, 4)
    q = octav_fx.quantize(model, x)
    with silent_quantizers():
        for t in (0.5, 0.25, 0.125):
            model.t = q.t = t
            torch.testing.assert_close(q(x), model(x))
    assert len(graphs_of(q).graphs_of(False)) == 3


def test_an_operand_has_a_sign_where_a_number_has_one() -> None:
    model = Net(lambda s, x: s.b(x.relu() * s.t)).eval()
    x = torch.randn(64, 4)
    q = octav_fx.quantize(model, x, Config(8, 8))
    for t in (0.5, 0.4, 0.3, -0.2, -0.1, math.inf, 0.7):
        model.t = q.t = t
        found, expected = q(x), model(x)
        if math.isfinite(t):
            assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_frozen_model_and_what_is_deployed_hold_for_the_present_value() -> None:
    x = torch.randn(64, 4)
    q = octav_fx.quantize(Net(used).eval(), x, Config(8, 8))
    for k in (0, 2, 1):
        set_to(q, k)
        octav_fx.calibrate(q, [x])
    octav_fx.freeze(q)
    torch.compiler.reset()
    call = torch.compile(q, backend="eager")
    for k in (1, 3, 2, 3):
        set_to(q, k)
        expected = copy.deepcopy(q)(x)
        assert torch.equal(q(x), expected) and torch.equal(call(x), expected)
        converted = octav_fx.convert(q, integers=False)
        assert torch.equal(converted(x), expected)
        # It holds for that value.
        set_to(q, k + 1)
        assert torch.equal(converted(x), expected)
    assert len(graphs_of(q).graphs_of(False)) == 2
