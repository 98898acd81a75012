"""written: what forward sets on its modules is back after a capture, and what that means for the graph is told."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.capture.symbolic.trace import capture
from octav_fx.capture.whole import WholeModule
from octav_fx.errors import NotCaptured
from octav_fx.ir.printer import graph_text
from tests.support.alike import assert_follows, quantized_alike, silent_quantizers
from tests.support.graphs import captured, model, run_alike


def remembering(self: nn.Module, x: Tensor) -> Tensor:
    self.last = self.fc(x)
    self.inner.last = x * 2
    return self.last + self.inner.last


def test_attributes_are_what_they_were() -> None:
    float_module = model(remembering, fc=nn.Linear(4, 4), inner=nn.Identity())
    float_module.inner.last = "nothing yet"
    before = {name: dict(vars(m)) for name, m in float_module.named_modules()}
    found = capture(float_module, {"x": torch.randn(2, 4)})
    assert sorted(found.stored) == ["inner.last", "last"]
    assert {name: dict(vars(m)) for name, m in float_module.named_modules()} == before
    assert not hasattr(float_module, "last") and float_module.inner.last == "nothing yet"


def test_attributes_are_what_they_were_after_an_error() -> None:
    def forward(self, x):
        self.last = self.table = self.fc(x)
        raise ValueError("as asked")

    float_module = model(forward, fc=nn.Linear(4, 4), table=torch.ones(3))
    with pytest.raises(NotCaptured, match="as asked"):
        capture(float_module, {"x": torch.randn(2, 4)})
    assert not hasattr(float_module, "last")
    assert type(float_module.table) is Tensor and torch.equal(float_module.table, torch.ones(3))


def test_a_model_that_remembers_its_last_result_is_one_graph_that_stores_it() -> None:
    float_module, x = model(remembering, fc=nn.Linear(4, 4), inner=nn.Identity()), torch.randn(2, 4)
    q = octav_fx.quantize(float_module, x)
    assert isinstance(q, WholeModule)
    assert [str(node) for node in q.graph.nodes if node.name.startswith("store_")] == ["store_", "store__1"]
    with octav_fx.float_mode(q):
        assert run_alike(q, float_module, torch.randn(3, 4))
    assert not hasattr(float_module.inner, "nothing")


class Table(nn.Module):
    """Makes a table on its first run and reads it ever after."""

    def __init__(self, as_buffer: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.made = 0
        if as_buffer:
            self.register_buffer("table", None, persistent=False)
        else:
            self.table: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.made += 1
            self.table = torch.arange(x.shape[1], dtype=x.dtype, device=x.device).cos()
        return self.fc(x * self.table)


@pytest.mark.parametrize("as_buffer", [True, False])
def test_a_table_that_is_made_once_is_read_by_the_graph(as_buffer: bool) -> None:
    float_module, x = Table(as_buffer), torch.randn(2, 4)
    q = octav_fx.quantize(float_module, x)
    assert isinstance(q, WholeModule)
    assert float_module.table is None and float_module.made == 0
    assert "cos" not in graph_text(q.graph)
    for module in (q, copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        with octav_fx.float_mode(module):
            assert torch.equal(module(x), copy.deepcopy(float_module)(x))
        assert torch.equal(module(x), q(x))


@pytest.mark.parametrize("as_buffer", [True, False])
def test_on_the_meta_device_the_table_is_made_in_each_call(as_buffer: bool) -> None:
    class Uncounted(Table):
        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(x.shape[1], dtype=x.dtype, device=x.device).cos()
            return self.fc(x * self.table)

    with torch.device("meta"):
        float_module, x = Uncounted(as_buffer), torch.randn(2, 4)
    q = octav_fx.quantize(float_module, x)
    assert isinstance(q, WholeModule) and q(x).is_meta


def accumulating(self: nn.Module, x: Tensor) -> Tensor:
    self.total = self.total + x.mean(0)
    return self.fc(x) + self.total


def test_a_value_computed_from_its_own_last_value_is_no_graph() -> None:
    float_module = model(accumulating, fc=nn.Linear(4, 4), total=torch.zeros(4))
    words = "forward computes total from its own last value, and a graph has no memory: write into it in place"
    with pytest.raises(NotCaptured, match=words):
        capture(float_module, {"x": torch.randn(2, 4)})
    assert torch.equal(float_module.total, torch.zeros(4))


def remaking(self: nn.Module, x: Tensor) -> Tensor:
    # As the anchors of a detector: made again for another size, out of other tensors of the module.
    if self.size != x.shape[0]:
        self.size, self.steps = x.shape[0], self.stride * torch.ones(x.shape[0], 1)
    return self.fc(x) * self.steps


def test_a_value_that_is_made_anew_from_others_is_a_graph() -> None:
    float_module, x = model(remaking, fc=nn.Linear(4, 4)), torch.randn(2, 4)
    float_module.stride, float_module.steps, float_module.size = torch.full((1,), 8.0), torch.ones(3, 1), 3
    q = octav_fx.quantize(float_module, x)
    assert isinstance(q, WholeModule)
    for size in (2, 5):
        with octav_fx.float_mode(q):
            assert torch.equal(q(torch.ones(size, 4)), float_module(torch.ones(size, 4)))
        assert q(torch.ones(size, 4)).shape == (size, 4)


@pytest.mark.parametrize("as_buffer", [True, False])
def test_quantized_it_still_remembers(as_buffer: bool) -> None:
    float_module, x = model(accumulating, fc=nn.Linear(4, 4)), torch.randn(2, 4)
    if as_buffer:
        float_module.register_buffer("total", torch.zeros(4))
    else:
        float_module.total = torch.zeros(4)
    q = octav_fx.quantize(float_module, x, strict=True)
    assert isinstance(q.fc, WholeModule) and "has no memory" in octav_fx.table(q)
    assert torch.equal(float_module.total, torch.zeros(4))
    with octav_fx.float_mode(q):
        for values in (x, x + 1, x):
            assert torch.equal(q(values), float_module(values))
    assert torch.equal(q.total, float_module.total)


def test_a_buffer_that_is_written_in_place_stays_in_the_graph() -> None:
    def forward(self, x):
        self.total.add_(x.mean(0))
        self.count.add_(1)
        return self.fc(x) + self.total

    float_module, x = model(forward, fc=nn.Linear(4, 4), total=torch.zeros(4), count=torch.zeros(())), torch.randn(3, 4)
    gm, other = captured(copy.deepcopy(float_module), x=torch.randn(2, 4)), float_module
    for values in (x, x + 1):
        assert torch.equal(gm(values), other(values))
    assert torch.equal(gm.total, other.total) and gm.count == 2


def test_adding_to_a_buffer_with_an_operator_is_remembered() -> None:
    def forward(self, x):
        self.total += x.mean(0)
        return self.fc(x) + self.total

    float_module, x = model(forward, fc=nn.Linear(4, 4), total=torch.zeros(4)), torch.randn(3, 4)
    q = octav_fx.quantize(float_module, x, strict=True)
    with octav_fx.float_mode(q):
        for values in (x, x + 1):
            assert torch.equal(q(values), float_module(values))
    total = q.total.clone()
    assert torch.equal(total, float_module.total)
    q(x)
    assert torch.equal(q.total, total + x.mean(0))


def test_a_number_that_forward_counts_is_what_it_was() -> None:
    def forward(self, x):
        self.calls += 1
        return self.fc(x)

    float_module, x = model(forward, fc=nn.Linear(4, 4)), torch.randn(2, 4)
    float_module.calls = 0
    capture(float_module, {"x": x})
    assert float_module.calls == 0
    assert octav_fx.quantize(float_module, x).calls == 0


def test_a_first_run_that_makes_a_table_moves_no_statistics() -> None:
    def forward(self, x):
        self.last = self.fc(x)
        return self.norm(self.last)

    float_module = model(forward, fc=nn.Linear(4, 4), norm=nn.BatchNorm1d(4)).train()
    q = octav_fx.quantize(float_module, torch.randn(8, 4))
    for name, value in float_module.state_dict().items():
        assert torch.equal(q.state_dict()[name], value), name


class Biased(nn.Module):
    """Attention as in LeViT: in eval mode a table is kept under a key made of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias, self.cache = nn.Linear(8, 24), nn.Parameter(torch.randn(1, 5)), {}
        self.register_buffer("index", torch.arange(25).view(5, 5) % 5, persistent=False)

    def train(self, mode: bool = True) -> "Biased":
        if mode:
            self.cache = {}
        return super().train(mode)

    def biases(self, device: torch.device) -> Tensor:
        if self.training:
            return self.bias[:, self.index]
        if (key := str(device)) not in self.cache:
            self.cache[key] = self.bias[:, self.index]
        return self.cache[key]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT + self.biases(x.device)).softmax(-1) @ v


class TestACache:
    """A dict that forward fills with what state alone decides."""

    @pytest.mark.slow
    @pytest.mark.parametrize("is_filled", [False, True])
    def test_is_computed_in_each_call(self, is_filled: bool) -> None:
        x = torch.randn(2, 5, 8)
        model = nn.Sequential(Biased(), Biased()).eval().requires_grad_(False)
        if is_filled:
            model(x)
        q = quantized_alike(model, (x,), (x[:1],))
        coverage = octav_fx.coverage(q.eval())
        assert coverage.quantized_macs == coverage.total_macs
        with torch.no_grad():
            before = q(x)
            q[1].bias += 1 * torch.arange(5)
            model[1].bias += 1 * torch.arange(5)
            model.train().eval()
            with silent_quantizers():
                # The same ops on the same numbers.
                assert torch.equal(q(x), model(x)) and not torch.equal(q(x), before)

    def test_of_what_depends_on_a_call_is_none(self) -> None:
        class Remembers(Biased):
            def forward(self, x: Tensor) -> Tensor:
                y = self.qkv(x)
                if "first" not in self.cache:
                    self.cache["first"] = y.detach()
                return y + self.cache["first"]

        assert_follows(
            lambda: Remembers().requires_grad_(False),
            ((torch.randn(2, 5, 8),), (torch.randn(2, 5, 8),)),
            training=False,
        )

    def test_by_which_the_first_call_is_told_from_others_is_none(self) -> None:
        class Begins(Biased):
            def forward(self, x: Tensor) -> Tensor:
                y = self.qkv(x)
                if "table" not in self.cache:
                    self.cache["table"], y = self.bias[:, self.index], y * 3
                return y + self.cache["table"].sum()

        x = torch.randn(2, 5, 8)
        assert_follows(lambda: Begins().requires_grad_(False), ((x,), (x,), (x,)), training=False)


class ByLast(nn.Module):
    """Another factor in a call of another length than the last one, as in one where a window slides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(4, 4), nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        factor = 1 if self.last in (0, len(x)) else 3
        self.last = len(x)
        return self.b(self.a(x)) * factor


@pytest.mark.slow
def test_a_first_run_that_makes_no_table_leaves_the_call_as_it_is() -> None:
    x, longer = torch.randn(2, 4), torch.randn(3, 4)
    assert_follows(ByLast, ((x,), (longer,), (longer,), (x,)), training=False)


class Last:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class StoresObjects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.lasts = nn.Linear(4, 4), [Last(torch.zeros(()))]

    def forward(self, x: Tensor) -> Tensor:
        self.last = Last(x.mean())
        self.lasts[0].value = x.amax()
        return self.a(x)


def test_objects_that_are_stored_hold_what_is_of_the_call() -> None:
    q: Any = octav_fx.quantize(StoresObjects(), torch.randn(2, 4))
    x = torch.randn(3, 4)
    q(x)
    assert isinstance(q, WholeModule) and (q.last.value, q.lasts[0].value) == (x.mean(), x.amax())


class Marked(nn.Module):
    """Says what it did, and looks at nothing of that."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.done, self.losses, self.mode = nn.Linear(4, 4), False, [1.0], "none"

    def forward(self, x: Tensor) -> Tensor:
        self.done, self.losses, self.mode = True, [], "training" if self.training else "eval"
        self.kinds = {"a": (1, [2])}
        return self.fc(x)


def told(q: Any) -> Any:
    return q[0].done, q[0].losses, q[0].mode, q[0].kinds


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.compile)])
def test_plain_values_are_stored(is_compiled: bool) -> None:
    x = torch.randn(2, 4)
    q: Any = octav_fx.quantize(nn.Sequential(Marked()).eval(), x)
    assert isinstance(q, WholeModule) and not q[0].done and not hasattr(q[0], "kinds")
    if is_compiled:
        q.compile(backend="eager")
    q(x)
    assert told(q) == (True, [], "eval", {"a": (1, [2])})
    q[0].done, q[0].kinds = False, None
    q.train()(x)
    assert told(q) == (True, [], "training", {"a": (1, [2])})
    octav_fx.freeze(octav_fx.calibrate(q.eval(), [x]))
    q[0].done, q[0].losses, q[0].kinds = False, None, None
    q(x)
    assert told(q) == (True, [], "eval", {"a": (1, [2])}) and type(q[0].losses) is type(q[0].kinds["a"][1]) is list
