"""Calls unlike the example: another graph with the same quantizers, or the module's own Python over its children."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import octav_fx
from octav_fx import OctavError
from octav_fx.capture.rerun import without_quantizers
from octav_fx.nn import FakeQuantizer
from octav_fx.training.again import MOST_GRAPHS
from tests.support.graphs import model

# Float addition in another order of the same sums: a few units in the last place of numbers near one.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def check(q: nn.Module, float_module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """q without its quantizers computes what the float model does, and with them nearly so."""
    with torch.random.fork_rng():
        expected = float_module(*args, **kwargs)
    found = q(*args, **kwargs)
    assert not torch.equal(found, expected)
    with without_quantizers(q), torch.random.fork_rng():
        torch.testing.assert_close(q(*args, **kwargs), expected, **CLOSE)


def linears(**forwards: Callable[..., Any]) -> dict[str, nn.Module]:
    return {name: model(f, a=nn.Linear(8, 8), b=nn.Linear(8, 8)) for name, f in forwards.items()}


def x(*shape: int) -> Tensor:
    return torch.randn(*shape)


def attention(self: Any, q: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(self.a(q), self.b(q), q, attn_mask=mask, is_causal=mask is None)


def added(self: Any, q: Tensor, mask: Tensor | None = None) -> Tensor:
    y = self.a(q)
    return y if mask is None else self.b(y + mask)


def recurrent(self: Any, q: Tensor) -> Tensor:
    h = torch.zeros_like(q[:, 0])
    for t in q.unbind(1):
        h = torch.tanh(self.a(t) + self.b(h))
    return h


def pieces(self: Any, q: Tensor) -> Tensor:
    return torch.stack([self.a(piece) * (i + 1) for i, piece in enumerate(torch.split(q, 2, 1))], 1)


def rest(self: Any, q: Tensor) -> Tensor:
    first, *others = self.a(q).chunk(q.shape[1], 1)
    return self.b(sum(others, first))


def mapped(self: Any, q: Tensor) -> Tensor:
    return sum(map(self.a, torch.tensor_split(self.b(q), (1, 2), dim=1)[1:])) + len(torch.unbind(q))


def by_key(self: Any, batch: dict[str, Tensor]) -> Tensor:
    y = self.a(batch["x"])
    if "y" in batch:
        y = y + self.b(batch["y"])
    return y + batch.get("z", 0)


def popped(self: Any, batch: dict[str, Any]) -> Tensor:
    batch = dict(batch)
    return self.a(batch.pop("x")) + batch.pop("y", 0)


def pair(self: Any, q: Tensor, state: Any = (None, None)) -> Tensor:
    h, c = state if isinstance(state, tuple) else (state, None)
    y = self.a(q)
    y = y if h is None else y + h
    return y if c is None else self.b(y * c)


def number(self: Any, q: Tensor, scale: float | Tensor = 1.0, mode: str = "sum") -> Tensor:
    y = self.a(q) * scale
    return y.sum(-1) if mode == "sum" else self.b(y)


def some_layers(self: Any, q: Tensor, which: range) -> Tensor:
    for i in which:
        q = (self.a, self.b)[i](q)
    return q


def branch(self: Any, q: Tensor) -> Tensor:
    y = self.a(q)
    return self.b(y) if y.shape[0] > 2 else y


# Forward, the example, and calls that Python answers otherwise.
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], list[tuple[Any, ...]]]] = {
    "a mask that is None later": (attention, (x(1, 6, 8), torch.ones(6, 6).tril().bool()), [(x(1, 6, 8),)]),
    "a mask that is a tensor later": (attention, (x(1, 6, 8),), [(x(1, 6, 8), torch.ones(6, 6).tril().bool())]),
    "a mask that is added": (added, (x(6, 8), x(8)), [(x(6, 8),), (x(5, 8), x(8))]),
    "unbind": (recurrent, (x(2, 6, 8),), [(x(2, 12, 8),), (x(3, 1, 8),)]),
    "split": (pieces, (x(2, 4, 8),), [(x(2, 6, 8),), (x(2, 2, 8),)]),
    "chunk and the rest": (rest, (x(2, 4, 8),), [(x(2, 5, 8),), (x(1, 1, 8),)]),
    "map over tensor_split": (mapped, (x(2, 3, 8),), [(x(4, 3, 8),)]),
    "a key": (by_key, ({"x": x(2, 8)},), [({"x": x(2, 8), "y": x(2, 8)},), ({"x": x(2, 8), "z": x(2, 8)},)]),
    "a key that is missing": (by_key, ({"x": x(2, 8), "y": x(2, 8)},), [({"x": x(2, 8)},)]),
    "pop": (popped, ({"x": x(2, 8), "y": x(8)},), [({"x": x(2, 8)},), ({"x": x(2, 8), "y": 2.0},)]),
    "None in a tuple": (pair, (x(2, 8), (x(8), None)), [(x(2, 8), (None, x(8))), (x(2, 8), (x(8), x(8))), (x(2, 8),)]),
    "a tuple or not": (pair, (x(2, 8), (x(8), x(8))), [(x(2, 8), x(8))]),
    "a number or a tensor": (number, (x(2, 8), 2.0), [(x(2, 8), x(8)), (x(2, 8), 3.0), (x(2, 8), 2)]),
    "a string": (number, (x(2, 8), 2.0, "sum"), [(x(2, 8), 2.0, "rows")]),
    "a range": (some_layers, (x(2, 8), range(1)), [(x(2, 8), range(2)), (x(3, 8), range(1, 2))]),
    "a size": (branch, (x(2, 8),), [(x(3, 8),), (x(1, 8),)]),
    "more axes": (branch, (x(2, 8),), [(x(3, 2, 8),)]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_python_decides_otherwise_is_another_graph(name: str) -> None:
    forward, example, others = CASES[name]
    float_module = model(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    q = octav_fx.quantize(float_module, example)
    for call in (example, *others, example):
        check(q, float_module, *call)
    count = len(q.graphs_of(False))
    # The graphs that are there serve every later call.
    for call in (*others, example):
        q(*call)
    assert len(q.graphs_of(False)) == count


def test_graphs_share_quantizers_and_parameters() -> None:
    float_module = model(added, a=nn.Linear(8, 8), b=nn.Linear(8, 8)).train()
    q = octav_fx.quantize(float_module, (x(6, 8), x(8)))
    before = dict(q.named_modules())
    parameters = list(q.parameters())
    loss = q(x(6, 8)).square().sum()
    assert dict(q.named_modules()) == before and all(map(torch.is_same_size, q.parameters(), parameters))
    loss.backward()
    assert q.a.weight.grad is not None and q.b.weight.grad is None


@pytest.mark.parametrize("granularity", ["channel", "group-4", "token"])
def test_an_edge_of_another_graph_keeps_its_quantizers(granularity: str) -> None:
    """Where b is not called a is the last layer, and would have 8 bits and no groups if it were captured first."""
    role = "activation" if granularity == "token" else "weight"
    config = octav_fx.Config(**{f"{role}_granularity": granularity})
    float_module = model(added, a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    for calls in ([(x(6, 8), x(8)), (x(6, 8),)], [(x(6, 8),), (x(6, 8), x(8))]):
        q = octav_fx.quantize(float_module, calls[0], config)
        first = {name: m.settings for name, m in q.named_modules() if isinstance(m, FakeQuantizer)}
        q(*calls[1])
        now = {name: m.settings for name, m in q.named_modules() if isinstance(m, FakeQuantizer)}
        assert {name: now[name] for name in first} == first and len(now) == 4


def test_a_new_branch_brings_its_quantizers_and_its_rows() -> None:
    float_module = model(added, a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    q = octav_fx.quantize(float_module, x(6, 8))
    assert {row.node for row in octav_fx.rows(q) if row.bits} == {"a"}
    q(x(6, 8), x(8))
    assert {row.node for row in octav_fx.rows(q) if row.bits} == {"a", "b"} and len(octav_fx.rows(q)) == 4
    assert {name for name, _ in q.quantizers.named_children()} == {"a_input", "a_weight", "b_input", "b_weight"}


@pytest.mark.slow
@pytest.mark.parametrize("again", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_copies_have_all_graphs_and_make_more(again: Callable[[nn.Module], Any]) -> None:
    q = octav_fx.quantize(nn.Sequential(Steps()), x(2, 6, 8))
    q(x(2, 4, 8))
    copied = again(q)
    assert len(copied.graphs_of(True)) == 2
    for length in (6, 4, 3):
        inputs = x(2, length, 8)
        assert torch.equal(copied(inputs), q(inputs))
    assert len(copied.graphs_of(True)) == 3
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in q.parameters()}


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, q: Tensor) -> Tensor:
        return recurrent(self, q)


def needs_data(self: Any, q: Tensor, mask: Tensor | None = None) -> Tensor:
    y = self.a(q)
    if mask is not None and mask.any():
        y = self.b(y)
    return self.b(y)


def test_a_call_that_no_graph_can_hold_runs_the_models_python_over_quantized_children() -> None:
    float_module = model(needs_data, a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    q = octav_fx.quantize(float_module, x(3, 8))
    quantizers = {name: m for name, m in q.named_modules() if isinstance(m, FakeQuantizer)}
    on, off = torch.ones(2).bool(), torch.zeros(2).bool()
    with pytest.warns(UserWarning, match=r"run its own Python, over quantized children: .*test_again\.py:\d+"):
        q(x(3, 8), on)
    for mask in (on, off, None):
        check(q, float_module, x(3, 8), mask)
    assert quantizers == {name: m for name, m in q.named_modules() if isinstance(m, FakeQuantizer)}
    assert "run its own Python, over quantized children" in octav_fx.table(q)
    # Parameters are those of q, wherever they go.
    q.double()
    assert q(x(3, 8).double(), on).dtype is torch.float64
    q(x(3, 8).double(), on).sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float64 for p in q.parameters())


@pytest.mark.slow
def test_there_are_so_many_graphs_and_then_its_own_python() -> None:
    q = octav_fx.quantize(Steps().eval(), x(2, 1, 8))
    float_module = Steps().eval()
    float_module.load_state_dict(q.state_dict())
    for length in range(1, MOST_GRAPHS + 1):
        q(x(2, length, 8))
    with pytest.warns(UserWarning, match=rf"{MOST_GRAPHS} graphs were captured, and none holds .*1 at capture, 9 now"):
        q(x(2, MOST_GRAPHS + 1, 8))
    for length in (20, 3, 9):
        check(q, float_module, x(2, length, 8))
    assert len(q.graphs_of(False)) == MOST_GRAPHS


class Experts(nn.Module):
    """Two experts, whose rows Python counts before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(2, 16, 16)) for _ in range(2))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        rows = F.grouped_mm(rows, self.up, offs=ends)
        rows = F.grouped_mm(rows * 2 if rows.size(0) > 4 else rows, self.down, offs=ends)
        # No op that says where its sizes come from: found by running what precedes it on fake tensors.
        rows = rows.repeat(1, 2)
        return rows if rows.size(1) > 16 else rows.relu()


@pytest.mark.slow
def test_sizes_of_grouped_products_are_found_in_float32() -> None:
    float_module, ends = Experts(), torch.tensor([3, 5], dtype=torch.int32)
    q = octav_fx.quantize(float_module, (x(5, 16), ends))
    check(q, float_module, x(5, 16), ends)
    check(q, float_module, x(9, 16), ends + torch.tensor([0, 4], dtype=torch.int32))
    assert len(q.graphs_of(True)) == 1
    few = torch.tensor([1, 3], dtype=torch.int32)
    check(q, float_module, x(3, 16), few)
    assert len(q.graphs_of(True)) == 2
    # torch compiles none of these by itself.
    torch.compiler.reset()
    compiled = torch.compile(q, backend="eager")
    for rows, at in ((x(5, 16), ends), (x(3, 16), few)):
        assert torch.equal(compiled(rows, at), q(rows, at))


def test_an_error_of_the_model_is_its_own() -> None:
    def forward(self: Any, q: Tensor) -> Tensor:
        assert q.shape[1] == 8, f"expected 8 columns, found {q.shape[1]}"
        return self.a(q)

    q = octav_fx.quantize(model(forward, a=nn.Linear(8, 8)), x(2, 8))
    with pytest.raises(AssertionError, match="expected 8 columns, found 7"):
        q(x(2, 7))
    assert q(x(5, 8)).shape == (5, 8)


def test_under_inference_mode_and_in_a_frozen_model() -> None:
    float_module = model(added, a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    q = octav_fx.quantize(float_module, (x(6, 8), x(8)))
    octav_fx.freeze(octav_fx.calibrate(q, [(x(6, 8), x(8))]))
    with torch.inference_mode():
        frozen = q(x(6, 8))
    assert frozen.shape == (6, 8) and len(q.graphs_of(False)) == 2
    fresh = octav_fx.freeze(octav_fx.calibrate(octav_fx.quantize(float_module, x(6, 8)), [x(6, 8)]))
    with pytest.warns(UserWarning, match=r"quantizer quantizers\.b_input finds its clip anew"):
        fresh(x(6, 8), x(8))


def test_a_converted_model_says_what_it_holds_for() -> None:
    float_module = model(added, a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    q = octav_fx.quantize(float_module, (x(6, 8), x(8)))
    converted = octav_fx.convert(octav_fx.freeze(octav_fx.calibrate(q, [(x(6, 8), x(8))])))
    assert converted(x(4, 8), x(8)).shape == (4, 8)
    for again in (converted, copy.deepcopy(converted)):
        with pytest.raises(octav_fx.OctavError, match="argument mask: a tensor of 1 axes at capture, None now"):
            again(x(4, 8))


@pytest.mark.parametrize("name", ["a mask that is added", "unbind", "a size", "a key", "a range"])
@pytest.mark.compile
def test_compiled_a_new_graph_is_a_recompilation_and_nothing_else_is(name: str) -> None:
    forward, example, others = CASES[name]
    float_module = model(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    q = octav_fx.quantize(float_module, example)
    torch._dynamo.reset()
    made = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        made.append(gm)
        return gm

    compiled = torch.compile(q, backend=backend)
    calls = [example, *others]
    for call in (*calls, *calls, *calls):
        torch.testing.assert_close(compiled(*call), q(*call), **CLOSE)
    before = len(made)
    for call in (*calls, *reversed(calls)):
        compiled(*call)
    assert len(made) == before


@pytest.mark.compile
@pytest.mark.parametrize("is_compiled", [False, True])
def test_asking_a_guard_moves_no_statistics(is_compiled: bool) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.norm(s.conv(x))
        # How many channels there are is known behind the norm, and asked before it runs.
        parts = y.split(y.shape[1] // 2, 1)
        return torch.cat(parts[::-1] if len(parts) > 1 else parts, 1)

    float_model = model(forward, conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4)).train()
    other, x = copy.deepcopy(float_model), torch.randn(4, 3, 5, 5)
    q = octav_fx.quantize(float_model, x)
    run = torch.compile(q, backend="octav") if is_compiled else q
    for size in (5, 5, 7):
        run(torch.randn(2, 3, size, size))
        other(torch.randn(2, 3, size, size))
    assert q.norm.num_batches_tracked == other.norm.num_batches_tracked == 3


def test_transforms_of_torch_func() -> None:
    q = octav_fx.quantize(nn.Sequential(nn.Linear(8, 8)).eval(), x := torch.randn(4, 8))

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(q, parameters, (x,)).sum()

    parameters = dict(q.named_parameters())
    octav_fx.freeze(octav_fx.calibrate(q, [x]))
    # Without a rule of their own quantizers go sample by sample.
    assert torch.equal(torch.func.vmap(q)(torch.stack([x, -x]))[1], q(-x))
    # A graph for a sample is captured outside of them, but not where they give the parameters.
    assert torch.equal(torch.func.vmap(q)(x)[1], q(x[1]))
    with pytest.raises(OctavError, match="captured inside of a transform"):
        torch.func.grad(loss)(parameters, torch.randn(3, 2, 4, 8))
    with octav_fx.float_mode(q):
        assert torch.equal(torch.func.grad(loss)(parameters, x)["0.bias"], torch.full((8,), 4.0))


def test_a_further_graph_leaves_no_quantizer_that_it_does_not_call() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            # Two operands with one value and one quantizer.
            return self.one(x) * scale + self.two(x)

    x = torch.randn(4, 8)
    q = octav_fx.quantize(Both(), x)
    names = list(octav_fx.state(q))
    q(x, scale=2.0)
    assert list(octav_fx.state(q)) == names and len(names) == 3


def test_modes_around_a_call_see_none_of_the_runs_that_capture_takes() -> None:
    q = octav_fx.quantize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(3, 4))
    call = torch.randn(2, 5, 4)
    with FlopCounterMode(display=False) as first:
        q(call)
    with FlopCounterMode(display=False) as second:
        q(call)
    assert first.get_total_flops() == second.get_total_flops() == 2 * 2 * 10 * 4 * 4
    with FlopCounterMode(display=False) as counter:
        octav_fx.quantize(nn.Linear(4, 4), torch.randn(3, 4))
    assert counter.get_total_flops() == 0
