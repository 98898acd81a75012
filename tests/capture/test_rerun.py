"""observe: running a model once leaves no trace but the hints; comparing two results."""

import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.capture.modules import graphs_of
from octav_fx.capture.rerun import (
    Inputs,
    difference,
    difference_where_written,
    has_data,
    macs_by_module,
    record_calls,
    run_once,
    same_kind,
    unwritten_as_nan,
    without_quantizers,
)
from octav_fx.capture.symbolic.trace import capture
from octav_fx.errors import NotCaptured
from tests.support.fuzz import Tripled
from tests.support.graphs import model


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


class Parts(nn.Module):
    """Multiplies in its own code, in a leaf, and in a part of a part; one part it calls in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner, self.idle = (
            nn.Conv1d(4, 4, 1),
            nn.Sequential(nn.Linear(5, 5), nn.ReLU()),
            nn.Linear(5, 5),
        )
        self.scaled = Scaled()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(self.conv(x)) @ x.transpose(1, 2)
        return self.scaled(y) + self.scaled(y, factor=2) + self.scaled(y + 1) + self.inner[0](x).sum()


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, factor: int = 1) -> torch.Tensor:
        return x.mul_(factor)


def test_work_is_by_the_innermost_module_in_the_order_of_the_run() -> None:
    module, x = Parts(), torch.randn(2, 4, 5)
    assert macs_by_module(module, Inputs((x,))) == [
        ("conv", 2 * 5 * 4 * 4),
        ("inner.0", 2 * 4 * 5 * 5),
        ("", 2 * 4 * 4 * 5),
        ("inner.0", 2 * 4 * 5 * 5),
    ]
    assert sum(macs for _, macs in macs_by_module(module, Inputs((), {"x": x}))) == 2 * (80 + 100 + 80 + 100)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())


def test_work_after_an_error_leaves_no_hooks() -> None:
    module = Parts()
    with pytest.raises(RuntimeError):
        macs_by_module(module, Inputs((torch.randn(2, 3, 5),)))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())


def test_calls_of_children_each_kind_once_and_what_they_were_given() -> None:
    module, x = Parts(), torch.randn(2, 4, 5)
    names = dict(module.named_children()) | {"inner.0": module.inner[0]}
    found = record_calls(module, [Inputs((x,))], names)
    assert {name: len(calls) for name, calls in found.items()} == {
        "conv": 1,
        "inner": 1,
        "inner.0": 1,
        "idle": 0,
        "scaled": 2,
    }
    assert [dict(call.kwargs) for call in found["scaled"]] == [{}, {"factor": 2}]
    assert torch.equal(found["conv"][0].args[0], x)
    # What a call wrote into its input afterwards is not in what was recorded.
    y = module.inner(module.conv(x)) @ x.transpose(1, 2)
    assert torch.equal(found["scaled"][1].args[0], y)


ALIKE = [
    (Inputs((torch.ones(2),)), Inputs((torch.zeros(2),)), True),
    (Inputs((torch.ones(2),)), Inputs((torch.ones(3),)), False),
    (Inputs((torch.ones(2),)), Inputs((torch.ones(2).double(),)), False),
    (Inputs((torch.ones(2),)), Inputs((torch.ones(2, device="meta"),)), False),
    (Inputs((1, "a", None)), Inputs((1, "a", None)), True),
    (Inputs((1,)), Inputs((True,)), False),
    (Inputs((1,)), Inputs((2,)), False),
    (Inputs((1,)), Inputs((torch.ones(()),)), False),
    (Inputs((), {"a": 1}), Inputs((), {"b": 1}), False),
    (Inputs((), {"a": 1}), Inputs((1,)), False),
    (Inputs(([torch.ones(1)],)), Inputs(((torch.ones(1),),)), False),
    (Inputs((X.dtype,)), Inputs((torch.float32,)), True),
    # Of an object it does not know it says no, so that each call of it is looked at.
    (Inputs((Parts,)), Inputs((object(),)), False),
]


@pytest.mark.parametrize(("one", "other", "expected"), ALIKE)
def test_calls_that_differ_in_the_contents_of_tensors_only_are_alike(
    one: Inputs, other: Inputs, expected: bool
) -> None:
    assert same_kind(one, other) is same_kind(other, one) is expected


def test_buffers_and_attributes_that_forward_replaces_are_as_before() -> None:
    def forward(self, x):
        self.count = self.count + 1
        self.last = x
        return x * self.count

    float_module = model(forward, count=torch.zeros(()), last=None)
    first, second = (run_once(float_module, (torch.ones(2),), {}) for _ in range(2))
    assert torch.equal(first, second)
    assert float_module.count == 0 and float_module.last is None


def test_hooks_that_a_first_call_installs_are_gone_again() -> None:
    def forward(self, x):
        if not hasattr(self, "hooked"):
            self.hooked = True
            self.fc.register_forward_hook(lambda module, args, y: y + 1)
        return self.fc(x)

    module, x = model(forward, fc=nn.Linear(4, 4)), torch.randn(2, 4)
    first, second = run_once(module, (x,), {}), run_once(module, (x,), {})
    assert torch.equal(first, second) and torch.allclose(first, x @ module.fc.weight.t() + module.fc.bias + 1)
    assert not hasattr(module, "hooked") and not module.fc._forward_hooks


def test_what_a_graph_reads_that_is_captured_meanwhile_stays() -> None:
    def forward(self, x):
        return self.fc(Tripled.apply(x) if len(x) > 3 else x)

    q = octav_fx.quantize(model(forward, fc=nn.Linear(4, 3)), torch.randn(2, 4))
    x = torch.randn(5, 4)
    run_once(q, (x,), {})
    graphs = graphs_of(q).graphs_of(True)
    assert len(graphs) == 2
    assert torch.equal(q(x), q(x)) and len(graphs) == 2


def test_a_capture_that_fails_leaves_no_constants() -> None:
    def forward(self, x):
        return self.fc(Tripled.apply(x)) if Tripled.apply(x).sum() > 0 else x

    float_module = model(forward, fc=nn.Linear(4, 3))
    before = set(vars(float_module))
    with pytest.raises(NotCaptured):
        capture(float_module, {"x": torch.randn(2, 4)})
    assert set(vars(float_module)) == before


def test_memory_that_nothing_writes_holds_nan_and_afterwards_torch_is_as_before() -> None:
    with pytest.raises(ValueError), unwritten_as_nan():
        assert torch.empty(1000).isnan().all()
        raise ValueError
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_what_is_written_is_compared_beside_rows_that_nothing_writes() -> None:
    nothing, zeros = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]]), torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert difference_where_written([nothing], [zeros]) is None
    assert difference_where_written([zeros], [nothing]) is not None
    assert difference_where_written([nothing], [zeros * 2]) is not None
    assert difference_where_written([nothing], zeros) is not None


@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float32).min, torch.nan])
def test_what_is_masked_hides_no_difference(mask: float) -> None:
    expected = torch.randn(4, 8)
    expected[:, 3:] = mask
    found = expected.clone()
    assert difference(expected, found) is None
    found[0, 0] += 1
    assert "is off by" in str(difference(expected, found))
    found[0, 3] = 0.0
    assert "in other places" in str(difference(expected, found))


def test_indices_that_are_others_are_a_difference() -> None:
    assert difference(torch.arange(20), torch.arange(20)) is None
    assert "is another one" in str(difference(torch.arange(20), torch.arange(20).flip(0)))


class Twice(nn.Module):
    """Calls a block with statistics twice, the second time as no graph of it knows yet, in its own Python."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Normed()

    def forward(self, x: Tensor, is_more: bool = False) -> Tensor:
        y = self.block(x)
        if y.sum() > 1e9:
            return y
        return self.block(y, 2.0) if is_more else y


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.norm(self.conv(x)) * scale


def test_a_graph_that_is_captured_within_a_forward_leaves_its_backward_alone() -> None:
    x = torch.randn(2, 3, 4, 4)
    q = octav_fx.quantize(Twice(), x)
    q(x, True).square().sum().backward()
    assert all(p.grad is not None for p in q.parameters())
