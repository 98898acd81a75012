"""What no graph can hold runs its own Python over quantized children, and what stays float is told."""

import copy
import functools
import inspect
import io
import pickle
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import while_loop
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

import octav_fx
from octav_fx import Config, OctavError, quantize
from octav_fx.capture.modules import graphs_of
from octav_fx.capture.whole import WholeModule
from tests.support.alike import quantized_alike, silent_quantizers
from tests.support.graphs import model as made
from tests.support.on_grid import OnGrid

# Four levels: fewer than any row of a weight here has values.
TWO_BITS = Config(weight_bits=2, activation_bits=2, edge_bits=None)


class Block(nn.Module):
    """A part that one graph holds."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        y = F.gelu(self.fc(x)) * scale
        return y if shift is None else y + shift


class Net(nn.Module):
    """A first convolution, a block, a head, and the user's Python between them."""

    def __init__(self, between: Callable[..., Tensor]) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv1d(8, 8, 3, padding=1), Block(), nn.Linear(8, 3)
        self.between, self.labels = between, ["a", "b", "c"]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self, self.stem(x).transpose(1, 2)))

    def predict(self, x: Tensor) -> list[str]:
        return [self.labels[i] for i in self(x).mean(1).argmax(-1)]


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 8, 5)


# What no graph can hold. Each is a function of the model and [B, 5, 8], and its blocks run.


def branch_on_data(m: Net, y: Tensor) -> Tensor:
    return m.block(y) if y.sum() < 1e9 else y


def loop_over_values(m: Net, y: Tensor) -> Tensor:
    for count in y.abs().mean((1, 2)).mul(0).long().tolist():
        y = y + count
    return m.block(y)


def item(m: Net, y: Tensor) -> Tensor:
    return m.block(y) * round(1 + 0 * y.sum().item())


def with_numpy(m: Net, y: Tensor) -> Tensor:
    return m.block(y) + torch.from_numpy(np.sign(y.detach().numpy()))


def generator(m: Net, y: Tensor) -> Tensor:
    def passes() -> Iterator[Tensor]:
        z = y
        while float(z.detach().norm()) > 1e9:
            yield z
        yield m.block(z)

    return sum(passes())


def without_gradients(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    @torch.no_grad()
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs)

    return wrapped


@without_gradients
def decorated(m: Net, y: Tensor) -> Tensor:
    assert not torch.is_grad_enabled()
    return m.block(y) * max(1, int(y.sum() * 0))


DEFEATS = {
    "a branch on data": branch_on_data,
    "a loop over values": loop_over_values,
    "item()": item,
    "numpy": with_numpy,
    "a generator": generator,
    "a decorator": decorated,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", DEFEATS)
def test_the_children_are_quantized_and_the_rest_runs_as_it_did(name: str, training: bool) -> None:
    model, x = Net(DEFEATS[name]).train(training), images()
    q = quantize(model, x, TWO_BITS, strict=True)
    assert type(q) is not Net and isinstance(q, Net) and not isinstance(q, WholeModule)
    assert all(isinstance(child, WholeModule) for child in q.children())
    with octav_fx.float_mode(q):
        for values in (x, images(3)):
            assert torch.equal(q(values), model(values))
    with OnGrid(2) as seen:
        out = q(images(3))
    assert (seen.checked, seen.off_grid) == (3, [])
    assert out.requires_grad
    lines, start = inspect.getsourcelines(inspect.unwrap(DEFEATS[name]))
    (found,) = re.findall(r"^the model: in parts, because .*test_by_parts\.py:(\d+)", octav_fx.table(q), re.MULTILINE)
    assert start <= int(found) < start + len(lines)
    covered = octav_fx.coverage(q)
    # [2, 8, 5] through a convolution of 8 * 3 inputs to each of 8 channels, a layer of 8 * 8 and one of 8 * 3.
    assert covered == octav_fx.Coverage(10 * (192 + 64 + 24), 10 * (192 + 64 + 24), [])


def in_the_open(m: Net, y: Tensor) -> Tensor:
    return y @ (m.block.fc.weight if y.sum() < 1e9 else y.transpose(1, 2))


def test_what_the_models_own_code_multiplies_is_a_float_row_with_its_line_and_its_work() -> None:
    model, x = Net(in_the_open), images()
    q = quantize(model, x, TWO_BITS)
    line = inspect.getsourcelines(in_the_open)[1] + 1
    why = f"test_by_parts.py:{line}: forward needs bool(lt), which depends on the data in a tensor"
    own = [row for row in octav_fx.rows(q) if row.node == "forward"]
    assert [(row.op, row.operand, row.bits, row.graph, row.macs) for row in own] == [("Net", "", None, None, 10 * 64)]
    assert why in own[0].reason
    assert own[0].share == pytest.approx(64 / (192 + 64 + 24))
    covered = octav_fx.coverage(q)
    assert (covered.quantized_macs, covered.total_macs) == (10 * (192 + 24), 10 * (192 + 64 + 24))
    assert [(node, macs) for node, _, macs in covered.skipped] == [("forward", 640), ("block.fc", 0)]
    what = "quantized: 77.14% of 2.80 k MACs of what ran; 1 module did not run; 1 nodes keep float operands"
    assert what in octav_fx.table(q)
    with pytest.raises(OctavError, match=r"strict=True, and 2 operands stay float:\n  forward : .*" + re.escape(why)):
        quantize(model, x, strict=True)
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))
    with OnGrid(2) as seen:
        q(x)
    # The product of the hole, and nothing else.
    assert (seen.checked, [shape for _, shape in seen.off_grid]) == (3, [(10, 8), (8, 8)])


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["eager", "octav"])
def test_compiled_the_hole_stays_float_and_the_parts_quantized(backend: str) -> None:
    torch._dynamo.reset()
    q, x = quantize(Net(in_the_open).eval(), images(), TWO_BITS), images()
    expected = q(x)
    with octav_fx.float_mode(q):
        floating = q(x)
    found = torch.compile(q, backend=backend)(x)
    if backend == "eager":
        assert torch.equal(found, expected)
    # Sums of 24 products in another order move a value by a step of its grid at most; a part more or less on a grid
    # moves all of them.
    assert (found - expected).norm() < 0.25 * (floating - expected).norm()


def squared(y: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return y @ y.T


class Helped(nn.Module):
    """A branch on data, and then a helper that breaks the graph where the module is no longer among the variables."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu())
        return y if float(y.detach().sum()) > 1e9 else squared(y)


@pytest.mark.compile
def test_compiled_a_helper_that_breaks_the_graph_stays_float() -> None:
    torch._dynamo.reset()
    q, x = quantize(Helped(), torch.randn(6, 8), TWO_BITS), torch.randn(6, 8)
    expected = q(x)
    found = torch.compile(q, backend="octav")(x)
    # Sums of 8 products in another order, one after another: some roundings of float32 (6e-8).
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Inner(nn.Module):
    """A part that has to come apart itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() < 1e9 else self.b(x)


class Outer(nn.Module):
    """Two levels of Python, shared parts, containers, parts that never run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(8, 8, 1)
        self.layers = nn.ModuleList([nn.ModuleDict({"one": Block(), "two": Inner()}) for _ in range(2)])
        self.layers[1]["one"] = self.layers[0]["one"]
        self.nothing, self.idle = None, nn.Linear(8, 4)
        self.twice = Block()
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))
        self.register_buffer("mean", torch.randn(8))
        self.offset = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.stem(x).transpose(1, 2) - self.mean + self.offset
        for layer in self.layers:
            y = y + layer["two"](layer["one"](y)) * max(1, int(y.sum() * 0))
        y = self.twice(y) + self.twice(y, shift=y) + self.twice(y, 2.0)
        return {"logits": self.head(y), "features": y}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def model() -> Outer:
    return Outer()


@pytest.mark.slow
def test_parts_of_parts(model: Outer) -> None:
    x = images()
    q = quantize(model, x, TWO_BITS)
    graphs = {name for name, module in q.named_modules() if isinstance(module, WholeModule)}
    # A block called in three ways has a graph for each.
    assert graphs == {"stem", "layers.0.one", "layers.0.two.a", "layers.1.two.a", "twice", "head"}
    assert q.layers[0]["one"] is q.layers[1]["one"]
    assert {row.graph for row in octav_fx.rows(q) if row.bits} == graphs
    with octav_fx.float_mode(q):
        assert same(q(x), model(x))
    with OnGrid(2) as seen:
        q(x)
    # The stem, one shared block and one inner block each time, one block three times, the head.
    assert (seen.checked, seen.off_grid) == (1 + 2 * 2 + 3 + 1, [])
    idle = {"idle", "layers.0.two.b.fc", "layers.1.two.b.fc"}
    assert {(node, reason) for node, reason, _ in octav_fx.coverage(q).skipped} == {
        (name, "not called for the example inputs") for name in idle
    }
    text = octav_fx.table(q)
    for part in ("the model", "layers.0.two", "layers.1.two"):
        assert f"\n{part}: in parts, because " in text


def test_keys_and_values_are_those_of_the_model_and_its_checkpoints_load(model: Outer) -> None:
    q = quantize(model, images())
    ours, theirs = q.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [name for name, _ in q.named_parameters()] == [name for name, _ in model.named_parameters()]
    other = Outer()
    q.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(q.state_dict(), strict=True)
    x = images()
    with octav_fx.float_mode(q):
        assert same(q(x), other(x))


def test_the_model_given_stays_as_it_was(model: Outer) -> None:
    x = images()
    before = copy.deepcopy(model.state_dict())
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    random = torch.get_rng_state()
    q = quantize(model, x)
    octav_fx.table(q)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not {p.data_ptr() for p in q.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert all(not m._forward_hooks for m in q.modules())


def test_class_attributes_and_methods_are_the_users() -> None:
    model, x = Net(branch_on_data).eval(), images()
    q = quantize(model, x)
    assert isinstance(q, Net) and type(q).__name__ == "Net" and isinstance(q.block, WholeModule)
    assert q.labels == ["a", "b", "c"]
    with octav_fx.float_mode(q):
        assert q.predict(x) == model.predict(x)
    q.labels = ["x", "y", "z"]
    assert set(q.predict(x)) <= {"x", "y", "z"} and model.labels == ["a", "b", "c"]


def _pickled(q: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(q))


def _saved(q: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("again", [copy.deepcopy, _pickled, _saved])
def test_copies_compute_the_same_and_are_apart(model: Outer, again: Callable[[nn.Module], nn.Module]) -> None:
    x = images()
    q = quantize(model.eval(), x)
    expected = q(x)
    copied = again(q)
    assert isinstance(copied, Outer) and same(copied(x), expected)
    assert copied.layers[0]["one"] is copied.layers[1]["one"]
    assert octav_fx.table(copied, x) == octav_fx.table(q, x)
    assert octav_fx.coverage(copied) == octav_fx.coverage(q)
    with octav_fx.float_mode(copied):
        assert same(copied(x), model(x))
        assert same(q(x), expected)
    with torch.no_grad():
        copied.offset.add_(1)
        copied.head.get_submodule("1").weight.mul_(2)
    assert same(q(x), expected) and not torch.equal(copied(x)["logits"], expected["logits"])


@pytest.mark.slow
def test_a_copy_that_was_pickled_forgets_the_example_inputs_only(model: Outer) -> None:
    q = quantize(model, images())
    assert {row.clip for row in octav_fx.rows(copy.deepcopy(q)) if row.bits} != {None}
    loaded = _pickled(q)
    assert {row.clip for row in octav_fx.rows(loaded)} == {None}
    assert [(r.node, r.operand, r.bits, r.macs, r.graph, r.reason) for r in octav_fx.rows(loaded)] == [
        (r.node, r.operand, r.bits, r.macs, r.graph, r.reason) for r in octav_fx.rows(q)
    ]


class Modes(nn.Module):
    """Dropout, a batch norm, and a branch on the mode inside of a part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.drop = nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.part = Auxiliary()

    def forward(self, x: Tensor) -> Any:
        y = self.drop(self.norm(self.stem(x))).transpose(1, 2)
        return self.part(y * max(1, int(y.sum() * 0)))


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main, self.aux = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        return (self.main(x), self.aux(x)) if self.training else self.main(x)


@pytest.mark.parametrize("training", [False, True])
def test_train_and_eval_reach_every_part(training: bool) -> None:
    model, x = Modes().train(training), images()
    q = quantize(model, x, TWO_BITS)
    for mode in (training, not training, training):
        assert q.train(mode) is q and {m.training for m in q.modules()} == {mode}
        model.train(mode)
        state = torch.get_rng_state()
        with octav_fx.float_mode(q):
            ours = q(x)
        torch.set_rng_state(state)
        for one, other in zip(ours if mode else [ours], model(x) if mode else [model(x)], strict=True):
            assert torch.equal(one, other)
        with OnGrid(2) as seen:
            out = q(x)
        model.load_state_dict(q.state_dict())
        assert isinstance(out, tuple) == mode
        assert (seen.checked, seen.off_grid) == (3 if mode else 2, [])


def bits(q: nn.Module) -> dict[str, tuple[int | None, ...]]:
    found: dict[str, tuple[int | None, ...]] = {}
    for row in octav_fx.rows(q):
        if row.reason != "not called for the example inputs":
            found[row.node] = (*found.get(row.node, ()), row.bits)
    return found


class Deep(nn.Module):
    """Several parts, each with convolutions and linear layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = self.part(), self.part(), self.part()

    @staticmethod
    def part() -> nn.Module:
        return nn.Sequential(nn.Conv1d(8, 8, 1), nn.ReLU(), nn.Conv1d(8, 8, 1), nn.Linear(5, 5), nn.Linear(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.first, self.second, self.third):
            x = part(x) * max(1, int(x.sum() * 0))
        return x


def test_edges_are_those_of_the_whole_model() -> None:
    found = bits(quantize(Deep(), images()))
    assert found == {
        f"{part}.{i}": (8, 8) if (part, i) in (("first", 0), ("third", 4)) else (4, 4)
        for part in ("first", "second", "third")
        for i in (0, 2, 3, 4)
    }


def test_overrides_are_by_the_path_in_the_whole_model() -> None:
    overrides = {"second.*": {"weight_bits": 3}, "*.3": {"activation_bits": 5}, "third.2": None}
    found = bits(quantize(Deep(), images(), Config(overrides=overrides)))
    assert found["second.0"] == (4, 3) and found["second.2"] == (4, 3) and found["second.4"] == (4, 3)
    assert {found[f"{part}.3"] for part in ("first", "second", "third")} == {(5, 4)}
    assert found["third.2"] == (None, None)
    assert found["first.0"] == (8, 8) and found["third.4"] == (8, 8)
    with pytest.raises(OctavError, match=r"overrides\['fourth\.\*'\] fits no node; there are first\.0, first\.2"):
        quantize(Deep(), images(), Config(overrides={"fourth.*": None}))


def test_an_op_that_is_a_part_itself_is_reached_by_its_name() -> None:
    found = bits(quantize(Net(branch_on_data), images(), Config(overrides={"stem": {"weight_bits": 2}})))
    assert found == {"stem": (8, 2), "block.fc": (4, 4), "head": (8, 8)}


@pytest.mark.parametrize("pattern", ["stem", "block.fc", "block.*"])
def test_an_override_that_leaves_all_of_a_part_float(pattern: str) -> None:
    model, x = Net(branch_on_data), images()
    q = quantize(model, x, Config(overrides={pattern: None}))
    (hole,) = octav_fx.coverage(q).skipped
    assert hole[0].startswith(pattern.partition(".")[0]) and f"override {pattern!r}: None" in hole[1]
    assert hole[2] == {"stem": 10 * 192}.get(pattern, 10 * 64)
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))


def test_gradients_flow_and_a_step_changes_every_parameter_that_ran(model: Outer) -> None:
    q, x = quantize(model, images()), images()
    before = {name: p.detach().clone() for name, p in q.named_parameters()}
    optimizer = torch.optim.SGD(q.parameters(), lr=0.1)
    q(x)["logits"].square().sum().backward()
    optimizer.step()
    idle = {"idle", "layers.0.two.b.fc", "layers.1.two.b.fc"}
    for name, p in q.named_parameters():
        ran = name.rpartition(".")[0] not in idle
        assert (p.grad is not None) == ran and torch.equal(p, before[name]) != ran, name
        assert p.isfinite().all()


def test_in_float_mode_gradients_are_those_of_the_model(model: Outer) -> None:
    q, x = quantize(model, images()), images()
    with octav_fx.float_mode(q):
        q(x)["logits"].square().sum().backward()
    model(x)["logits"].square().sum().backward()
    for (name, ours), theirs in zip(q.named_parameters(), model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name


def test_another_dtype_works_for_parts_as_for_whole_graphs() -> None:
    for forward in (branch_on_data, lambda m, y: m.block(y)):
        q = quantize(Net(forward).eval(), images()).to(torch.bfloat16)
        out = q(images().bfloat16())
        assert out.dtype is torch.bfloat16 and out.isfinite().all()


def test_the_outermost_table_is_found_inside_of_a_module_of_the_users() -> None:
    q = quantize(Net(branch_on_data), images())
    outer = nn.Sequential(q, nn.Softmax(-1))
    assert octav_fx.table(outer) == octav_fx.table(q) and octav_fx.coverage(outer) == octav_fx.coverage(q)


def test_it_is_quantized_already() -> None:
    q = quantize(Net(branch_on_data), images())
    for again in (q, nn.Sequential(q), copy.deepcopy(q)):
        with pytest.raises(OctavError, match="quantized already"):
            quantize(again, images())


# Children that are used in other ways than by a call of theirs.


class Applied(nn.Module):
    """A function of the parts and the input, after a step that no graph holds."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function, self.head = function, nn.Linear(8, 3)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self, x * max(1, int(x.sum() * 0))))


class Encoder(Block):
    def encode(self, x: Tensor) -> Tensor:
        return self.fc(x).relu()


def test_a_child_whose_method_is_called_is_quantized_below() -> None:
    model, x = Applied(lambda m, x: m.part.encode(x), part=Encoder()), torch.randn(4, 8)
    q = quantize(model, x, TWO_BITS, strict=True)
    assert isinstance(q.part, Encoder) and isinstance(q.part.fc, WholeModule)
    check(q, model, x, 2)


def test_a_child_that_is_called_and_whose_method_is_called_too() -> None:
    model, x = Applied(lambda m, x: m.part(x) + m.part.encode(x), part=Encoder()), torch.randn(4, 8)
    q = quantize(model, x, TWO_BITS, strict=True)
    assert isinstance(q.part, Encoder) and "part: in parts, because the code around it: " in octav_fx.table(q)
    check(q, model, x, 3)


def test_a_child_whose_weight_is_read_beside_its_calls_is_quantized() -> None:
    model, x = Applied(lambda m, x: m.part.fc(x) + m.part.fc.weight.mean(), part=Block()), torch.randn(4, 8)
    check(quantize(model, x, TWO_BITS, strict=True), model, x, 2)


def test_a_forward_that_was_replaced_on_a_child() -> None:
    part = Block()
    part.forward = lambda x: part.fc(x) * 2
    model, x = Applied(lambda m, x: m.part(x), part=part), torch.randn(4, 8)
    with octav_fx.float_mode(q := quantize(model, x)):
        assert torch.equal(q(x), model(x))


def test_hooks_of_children_run_once_on_each_call() -> None:
    calls: list[str] = []
    model, x = Net(branch_on_data), images()
    model.block.register_forward_pre_hook(lambda module, args: calls.append("before"))
    model.block.register_forward_hook(lambda module, args, y: calls.append("after") or y * 2)
    model.register_forward_hook(lambda module, args, y: calls.append("root") or y + 1)
    expected = model(x)
    q = quantize(model, x, TWO_BITS)
    calls.clear()
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), expected)
    assert calls == ["before", "after", "root"]
    q(x)
    assert calls == ["before", "after", "root"] * 2


def test_a_hook_that_needs_data_runs() -> None:
    seen: list[float] = []
    model, x = nn.Sequential(Block(), nn.Linear(8, 3)), torch.randn(4, 8)
    model[0].register_forward_hook(lambda module, args, y: seen.append(float(y.detach().sum())))
    q = quantize(model, x, TWO_BITS, strict=True)
    seen.clear()
    check(q, model, x, 2)
    assert len(seen) == 3


# A deprecated function of torch that people use.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_child_stays_float_with_its_work() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    model, x = Applied(lambda m, x: m.part(x), part=scripted), torch.randn(4, 8)
    q = quantize(model, x, TWO_BITS)
    assert [(node, macs) for node, _, macs in octav_fx.coverage(q).skipped] == [("forward", 4 * 64), ("part", 0)]
    assert "a scripted module" in octav_fx.table(q)
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))
    with pytest.raises(OctavError, match="scripted"):
        quantize(model, x, strict=True)


def test_a_recurrent_child_stays_float_with_its_work() -> None:
    model, x = Applied(lambda m, x: m.part(x)[0], part=nn.LSTM(8, 8, batch_first=True)), torch.randn(2, 5, 8)
    q = quantize(model, x, TWO_BITS)
    # Four gates of each of ten steps, from the input and from the last output.
    assert octav_fx.coverage(q).skipped == [("part", "no rule for LSTM", 10 * 4 * 2 * 64)]
    assert octav_fx.coverage(q).quantized_macs == 10 * 24
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))
    with pytest.raises(OctavError, match="part : no rule for LSTM"):
        quantize(model, x, strict=True)


def test_a_child_that_another_one_holds_too() -> None:
    class Holder(nn.Module):
        def __init__(self, part: nn.Module) -> None:
            super().__init__()
            self.part = part

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x).tanh()

    part = Block()
    model, x = Applied(lambda m, x: m.part(x) + m.holder(x), part=part, holder=Holder(part)), torch.randn(4, 8)
    q = quantize(model, x, TWO_BITS, strict=True)
    check(q, model, x, 3)
    assert q.part.fc.weight is q.holder.part.fc.weight
    assert list(q.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        before = q(x)
        q.part.fc.weight.zero_()
        assert not torch.equal(q(x), before)


def test_tied_weights_stay_tied() -> None:
    model, x = Applied(lambda m, x: m.b(m.a(x)), a=nn.Linear(8, 8), b=nn.Linear(8, 8)), torch.randn(4, 8)
    model.b.weight = model.a.weight
    q = quantize(model, x, TWO_BITS, strict=True)
    assert q.a.weight is q.b.weight and len(list(q.parameters())) == len(list(model.parameters()))
    check(q, model, x, 3)


def test_a_child_called_with_shapes_that_go_other_ways() -> None:
    class Padded(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            return x.repeat(2, 1) if x.shape[0] < 4 else x

    model = Applied(lambda m, x: m.part(x) + m.part(x[:2]), part=Padded())
    x = torch.randn(4, 8)
    check(quantize(model, x, TWO_BITS, strict=True), model, x, 3)


def test_random_numbers_of_python_and_numpy_in_the_models_code() -> None:
    model = Applied(lambda m, x: m.part(x) * random.random() + np.random.rand(), part=Block())
    x = torch.randn(4, 8)
    states = random.getstate(), np.random.get_state()[1].tolist()
    q = quantize(model, x, TWO_BITS, strict=True)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    results = []
    with octav_fx.float_mode(q):
        for module in (q, model):
            random.seed(1)
            np.random.seed(1)
            results.append(module(x))
    assert torch.equal(*results)


# The model's own code sees that its parts changed; what it then computes is not what it computed.
LOOKS_AT_ITS_PARTS: dict[str, Callable[..., Tensor]] = {
    "counts buffers": lambda m, x: m.part(x) * (1 + len(list(m.part.buffers()))),
    "counts modules": lambda m, x: m.part(x) * len(list(m.part.modules())),
    "asks for a class": lambda m, x: m.part.fc(x) if type(m.part.fc) is nn.Linear else x * 100,
}


@pytest.mark.parametrize("name", LOOKS_AT_ITS_PARTS)
def test_a_child_that_cannot_be_another_module_stays_float_with_its_work(name: str) -> None:
    model, x = Applied(LOOKS_AT_ITS_PARTS[name], part=Block()), torch.randn(4, 8)
    q = quantize(model, x, TWO_BITS)
    (hole,) = octav_fx.coverage(q).skipped
    assert hole[0].startswith("part") and "the code around it" in hole[1] and hole[2] == 4 * 64
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))


def test_a_child_asked_for_a_class_of_the_users_is_of_that_class() -> None:
    model = Applied(lambda m, x: m.part(x) if isinstance(m.part, Block) else x * 100, part=Block())
    x = torch.randn(4, 8)
    check(quantize(model, x, TWO_BITS, strict=True), model, x, 2)


def test_a_child_whose_failure_is_caught() -> None:
    def tries(m: Applied, x: Tensor) -> Tensor:
        try:
            return m.part(x[:, :4])
        except RuntimeError:
            return m.part(x)

    model, x = Applied(tries, part=Block()), torch.randn(4, 8)
    q = quantize(model, x, TWO_BITS)
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))


MOVES: dict[str, Callable[..., Any]] = {
    "to": lambda m, x: m.part.to(x.device)(x),
    "to a dtype": lambda m, x: m.part.to(x.dtype)(x),
    "float": lambda m, x: m.part.float()(x),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_child_that_forward_moves(name: str) -> None:
    model, x = made(MOVES[name], part=Block()), torch.randn(4, 8)
    q = quantize(model, x, TWO_BITS)
    assert octav_fx.coverage(q).quantized_macs == octav_fx.coverage(q).total_macs
    assert "forward moves part to a device or dtype, and a graph moves no modules" in str(octav_fx.table(q))
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))


def test_children_under_vmap() -> None:
    model, x = Applied(lambda m, x: torch.vmap(m.part)(x), part=Block()), torch.randn(4, 8)
    q = quantize(model, x, TWO_BITS)
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))


CALLS: dict[str, Callable[..., Tensor]] = {
    "forward itself": lambda m, x: m.part.forward(x),
    "a checkpoint": lambda m, x: checkpoint(m.part, x, use_reentrant=False),
    "functional_call": lambda m, x: torch.func.functional_call(m.part, dict(m.part.named_parameters()), (x,)),
    "its modes in turn": lambda m, x: m.part.eval()(x) + m.part.train()(x),
    "a region": lambda m, x: in_bfloat16(m.part, x).float(),
    "a write into what it was given": lambda m, x: (lambda y: m.part(y) + y.add_(1))(x.clone()),
}


def in_bfloat16(part: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return part(x)


@pytest.mark.parametrize("name", CALLS)
def test_ways_to_call_a_child(name: str) -> None:
    model, x = Applied(CALLS[name], part=Block()), torch.randn(4, 8)
    q = quantize(model, x, TWO_BITS, strict=True)
    check(q, model, x, 3 if name == "its modes in turn" else 2)
    q(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in q.parameters())


def test_what_the_models_code_keeps_from_its_first_run_is_not_there_after_quantize() -> None:
    def memo(m: Applied, x: Tensor) -> Tensor:
        if not hasattr(m, "first"):
            m.first = m.part(x).detach()
        return x + m.first

    model, x = Applied(memo, part=Block()), torch.randn(4, 8)
    q = quantize(model, x, TWO_BITS, strict=True)
    assert not hasattr(q, "first") and not hasattr(model, "first")
    check(q, model, x, 1)


def check(q: nn.Module, model: nn.Module, x: Tensor, contractions: int) -> None:
    """Float mode is exact, and each contraction reads values on a grid."""
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))
    with OnGrid(2) as seen:
        q(x)
    assert (seen.checked, seen.off_grid) == (contractions, [])


class Box:
    """An argument that torch cannot look into."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.count = x, 0


def test_an_object_that_is_an_argument_is_not_written_to() -> None:
    class Opens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Block()

        def forward(self, box: Box) -> Tensor:
            box.count += 1
            box.x = self.part(box.x * 2)
            return box.x

    model, x = Opens(), torch.randn(4, 8)
    given = Box(x)
    q = quantize(model, (given,), strict=True)
    octav_fx.table(q)
    assert given.count == 0 and given.x is x
    with octav_fx.float_mode(q):
        assert torch.equal(q(Box(x)), model(Box(x)))
    assert not torch.equal(q(Box(x)), model(Box(x)))


# Where there is nothing to stand on.


def test_a_model_of_which_nothing_can_be_captured_says_why() -> None:
    class Hopeless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w if x.sum() > 0 else x

    with pytest.raises(OctavError, match=r"test_by_parts\.py:\d+: forward needs bool\(gt\), which depends on the data"):
        quantize(Hopeless(), torch.ones(2, 8))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((), "do not fit Net.forward: missing a required argument: 'x'"),
        ({"y": None}, "do not fit Net.forward"),
        (torch.randn(2, 4, 5), r"capture stopped at .*test_by_parts\.py:\d+: RuntimeError: .*channels"),
        ("a string", r"capture stopped at .*test_by_parts\.py:\d+: TypeError"),
    ],
)
def test_inputs_that_do_not_fit(example: Any, message: str) -> None:
    with pytest.raises(OctavError, match=message):
        quantize(Net(branch_on_data), example)


def test_a_model_that_fails_where_the_capture_cannot_look() -> None:
    def fails(m: Net, y: Tensor) -> Tensor:
        if y.sum().item() < 1e9:
            raise ValueError("not today")
        return m.block(y)

    with pytest.raises(OctavError, match=r"test_by_parts\.py:\d+") as caught:
        quantize(Net(fails), images())
    assert isinstance(caught.value.__cause__, ValueError)


def test_on_the_meta_device_what_needs_data_cannot_be_taken_apart() -> None:
    with torch.device("meta"):
        model, x = Net(branch_on_data), images()
    with pytest.raises(OctavError, match=r"test_by_parts\.py:\d+: forward needs"):
        quantize(model, x)


def test_on_the_meta_device_a_model_in_parts_for_its_names() -> None:
    with torch.device("meta"):
        model, x = Net(lambda m, y: m.block(y) + m.meta), images()
        model.meta = nn.Parameter(torch.ones(8))
    q = quantize(model, x)
    assert bits(q) == {"stem": (8, 8), "block.fc": (4, 4), "head": (8, 8)}
    assert {row.clip for row in octav_fx.rows(q)} == {None}


def test_a_mode_that_no_graph_holds_is_run_in_parts_too() -> None:
    def between(m: Net, y: Tensor) -> Tensor:
        return m.block(y * (1 + int(y.sum() > 1e9)) if m.training else y)

    model, x = Net(between).eval(), images()
    q = quantize(model, x, TWO_BITS, strict=True)
    assert isinstance(q, Net) and "training mode is not captured: " in octav_fx.table(q)
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))
        assert torch.equal(q.train()(x), model.train()(x))


def test_a_part_in_parts_that_does_not_fit_is_float_again() -> None:
    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Encoder()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * max(1, int(x.sum() * 0)))

    model, x = Applied(lambda m, x: m.part(x) + m.part.inner.encode(x), part=Middle()), torch.randn(4, 8)
    q = quantize(model, x, TWO_BITS)
    assert [(node, macs) for node, _, macs in octav_fx.coverage(q).skipped] == [("part", 2 * 4 * 64)]
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))


def test_a_module_with_two_parents_is_quantized_in_both() -> None:
    shared = nn.Linear(8, 8)

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = shared

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x * max(1, int(x.sum() * 0)))

    model = Applied(lambda m, x: m.loop(m.one(x)), one=nn.Sequential(shared), loop=Loop())
    q, x = quantize(model, torch.randn(4, 8), TWO_BITS), torch.randn(4, 8)
    with OnGrid(2) as seen:
        q(x)
    assert (seen.checked, seen.off_grid) == (3, [])
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))


class Parametrized(nn.Module):
    """Computes a parameter of its own, and one of a child, around a branch on data."""

    def __init__(self) -> None:
        super().__init__()
        self.normed, self.fc, self.scale = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(8))
        nn.utils.parametrizations.weight_norm(self.normed)
        nn.utils.parametrize.register_parametrization(self, "scale", nn.Softplus())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.normed(x)) * self.scale if x.sum().item() < 1e9 else x


def test_a_model_in_parts_that_computes_its_parameters_is_copied_and_converted() -> None:
    x = torch.randn(4, 8)
    q = octav_fx.quantize(Parametrized().eval(), x)
    copied = copy.deepcopy(q)
    assert torch.equal(copied(x), q(x))
    octav_fx.freeze(octav_fx.calibrate(copied, [(x,)]))
    # The same codes and sums, scaled in another order.
    torch.testing.assert_close(octav_fx.convert(copied, integers=False)(x), copied(x), rtol=1e-4, atol=1e-4)


class Router(nn.Module):
    """Has a number that the code around it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.num_experts = nn.Linear(8, 4), 4

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).softmax(-1)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.fc = Router(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x)
        return self.fc(x) * self.router.num_experts * p.amax(-1, keepdim=True) if p.sum().item() < 1e9 else x


def test_what_the_code_around_reads_is_there_after_convert() -> None:
    x = torch.randn(4, 8)
    q = octav_fx.quantize(Routed().eval(), x)
    octav_fx.freeze(octav_fx.calibrate(q, [(x,)]))
    converted = octav_fx.convert(q)
    assert copy.deepcopy(converted).router.num_experts == 4
    converted(x)
    with pytest.raises(AttributeError, match="num_heads"):
        converted.router.num_heads  # noqa: B018


class Forces(nn.Module):
    """An energy, and its gradient by the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = self.head(torch.tanh(self.fc(x))) + x.square().sum(-1, keepdim=True)
            return energy, -torch.autograd.grad(energy.sum(), x, create_graph=self.training)[0]


def test_a_gradient_through_integers_is_refused() -> None:
    x = torch.randn(4, 3)
    q = octav_fx.quantize(Forces().eval(), x)
    octav_fx.freeze(octav_fx.calibrate(q, [(x,)]))
    assert q(x)[1].abs().sum() > 0
    with pytest.raises(OctavError, match="a converted model multiplies integers and has no gradient"):
        octav_fx.convert(q)(x)


TRANSFORMED: dict[str, tuple[Callable[..., Any], int]] = {
    "vmap": (lambda s, x: s.b(torch.vmap(s.a)(x)), 256),
    "vmap and a call": (lambda s, x: s.b(torch.vmap(s.a)(x) + s.a(x)), 384),
    "vmap over another axis": (lambda s, x: s.b(torch.vmap(s.a, in_dims=1, out_dims=1)(x[None])[0]), 256),
    "grad": (lambda s, x: s.b(torch.func.grad(lambda t: s.a(t).tanh().sum())(x)), 128),
    "parameters of each sample": (lambda s, x: s.b(of_each(s.a, x)), 128),
}


def of_each(layer: nn.Module, x: Tensor) -> Any:
    stacked = {name: torch.stack([p, 2 * p]) for name, p in layer.named_parameters()}
    return torch.vmap(lambda p, t: torch.func.functional_call(layer, p, (t,)))(stacked, x)


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.compile)])
def test_what_transforms_call(name: str, is_compiled: bool) -> None:
    """What vmap calls is quantized, and has a row where others do."""
    forward, macs = TRANSFORMED[name]
    model, x = made(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8)), torch.randn(2, 8)
    q = octav_fx.quantize(model, x)
    with silent_quantizers():
        for given in (x, torch.randn(2, 8)):
            torch.testing.assert_close(q(given), model(given))
    reasons = {site: reason for site, reason, _ in octav_fx.coverage(q).skipped}
    assert octav_fx.coverage(q).quantized_macs == macs
    if macs == 128:
        assert reasons["a"] == "no call of it succeeds outside of torch.cond, while_loop or a transform of torch.func"
    if is_compiled:
        expected = q(x)
        q.compile(backend="eager")
        torch.testing.assert_close(q(x), expected)


def test_clips_of_what_vmap_calls() -> None:
    x = torch.randn(3, 8) * torch.tensor([[1.0], [10.0], [100.0]])
    model = made(lambda s, x: torch.vmap(s.a)(x), a=nn.Linear(8, 8)).eval()
    q = octav_fx.quantize(model, x, octav_fx.Config(weight_bits=8, activation_bits=8))
    octav_fx.freeze(octav_fx.calibrate(q, [x]))
    (clip,) = (value for name, value in q.named_buffers() if name.endswith("input.clip"))
    torch.testing.assert_close(clip, torch.stack([octav_fx.optimal_clip(row, 8) for row in x]).mean())
    with torch.no_grad():
        for integers in (False, True):
            torch.testing.assert_close(octav_fx.convert(q, integers=integers)(x), q(x))


def test_what_vmap_calls_is_captured_again() -> None:
    model = made(lambda s, x: torch.vmap(s.a)(x), a=Sized()).eval()
    q = octav_fx.quantize(model, torch.randn(2, 3, 8))
    with silent_quantizers():
        for length in (3, 6, 3):
            x = torch.randn(2, length, 8)
            torch.testing.assert_close(q(x), model(x))
    assert len(graphs_of(q.a).graphs_of(False)) == 2  # type: ignore[union-attr, arg-type]


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.one(x) if x.shape[0] > 4 else self.two(x)


def attending(s: Any, x: Tensor) -> Tensor:
    q, k, v = (part[:, None] for part in s.a(x).chunk(3, -1))
    return s.b(flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score - (i - j).abs() * 0.1)[:, 0])  # type: ignore[no-any-return]


def looping(s: Any, x: Tensor) -> Tensor:
    state = (torch.zeros(()), s.a(x)[..., :16].contiguous())
    _, y = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, (y @ y.transpose(1, 2) @ y).tanh()), state)
    return s.b(y)  # type: ignore[no-any-return]


class Inherits(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def looping_over_a(s: Any, x: Tensor) -> Tensor:
    state = (torch.zeros(()), s.b(x))
    _, y = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, s.a(y).tanh()), state)
    return s.b(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [nn.Linear, Inherits])
def test_what_a_while_loop_calls_stays_float_with_a_row(kind: type) -> None:
    # On a CPU it has no gradient.
    model = made(looping_over_a, a=kind(8, 8), b=nn.Linear(8, 8)).eval().requires_grad_(False)
    x = torch.randn(4, 8)
    q = octav_fx.quantize(model, x)
    covered = octav_fx.coverage(q)
    ((site, reason, macs),) = covered.skipped
    assert site.startswith("a") and "outside of torch.cond, while_loop" in reason
    assert (covered.quantized_macs, macs) == (2 * 4 * 64, 3 * 4 * 64)
    with silent_quantizers():
        for given in (x, torch.randn(6, 8)):
            torch.testing.assert_close(q(given), model(given))
    with pytest.raises(OctavError, match=r"a: no call .* outside of torch\.cond, while_loop"):
        octav_fx.quantize(made(looping_over_a, a=kind(8, 8), b=nn.Tanh()).eval().requires_grad_(False), x)


@pytest.mark.slow
@pytest.mark.parametrize(("forward", "macs"), [(attending, 2 * 2 * 16 * 16 * 16), (looping, 3 * 2 * 2 * 16 * 16 * 16)])
def test_what_compiles_itself_stays_float_and_runs_on(forward: Callable[..., Tensor], macs: int) -> None:
    # On a CPU it has no gradient.
    model = made(forward, a=nn.Linear(16, 48), b=nn.Linear(16, 16)).eval().requires_grad_(False)
    x = torch.randn(2, 16, 16)
    q = octav_fx.quantize(model, x)
    assert [(site, found) for site, _, found in octav_fx.coverage(q).skipped] == [("forward", macs)]
    assert octav_fx.coverage(q).quantized_macs == 2 * 16 * 16 * (48 + 16)
    with octav_fx.float_mode(q):
        # A count of products once kept such code from being compiled ever after, here and in the model itself.
        assert torch.equal(q(x), model(x))
    assert model(torch.randn(3, 24, 16)).shape == (3, 24, 16)


def test_every_call_of_a_part_counts() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = x[:, 0]
        for t in range(x.shape[1]):
            h = s.cell(s.fc(x[:, t]), h) if h.sum().item() < 1e9 else h
        return h

    q = octav_fx.quantize(made(forward, cell=nn.GRUCell(8, 8), fc=nn.Linear(8, 8)), torch.randn(2, 5, 8))
    covered = octav_fx.coverage(q)
    assert (covered.quantized_macs, covered.total_macs) == (5 * 2 * 64, 5 * 2 * (64 + 2 * 8 * 24))


def test_layers_that_training_leaves_out_by_chance_are_quantized() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        for layer in s.layers:
            if not (s.training and torch.rand(1).item() <= 0.5):
                x = layer(x).relu()
        return x

    for seed in range(3):
        torch.manual_seed(seed)
        model = made(forward, layers=nn.ModuleList(nn.Linear(8, 8) for _ in range(4))).train()
        q = octav_fx.quantize(model, torch.randn(4, 8))
        assert q.training and all(layer.training for layer in q.layers)
        assert not octav_fx.coverage(q).skipped
        x = torch.randn(3, 8)
        for layer in q.layers:
            assert not torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


class Merging(nn.Linear):
    """An adapter that eval mode adds to the weight, and training mode takes out."""

    is_merged = False

    def train(self, mode: bool = True) -> Any:
        if self.is_merged is mode:
            self.weight.data *= 0.5 if mode else 2
            self.is_merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if self.is_merged else 2)


@pytest.mark.parametrize("training", [False, True])
def test_the_other_mode_merges_no_weights(training: bool) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.fc(x)
        return s.out(y if y.sum().item() > 0 else -y)

    model, x = made(forward, fc=Merging(8, 8), out=nn.Linear(8, 8)).train(training), torch.randn(4, 8)
    q = octav_fx.quantize(model, x)
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))
    assert torch.equal(q.fc.weight, model.fc.weight)


class Reversed(torch.autograd.Function):
    """x + block(x), for which backward computes block(x) again from x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.x, ctx.block = x.detach(), block
        with torch.no_grad():
            return x + block(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            torch.autograd.backward(ctx.block(x), gradient)
        return gradient + x.grad, None


@pytest.mark.slow
def test_layers_that_a_function_with_a_gradient_of_its_own_calls():
    float_model = made(lambda s, x: s.head(Reversed.apply(s.stem(x), s.block)), **layers())
    q = quantized_alike(float_model, (torch.randn(2, 8),), (torch.randn(5, 8),), parts=True)
    assert octav_fx.coverage(q).share == 1
    assert "Reversed has a gradient of its own and calls block, which a graph would not see" in octav_fx.table(q)


def test_what_such_a_function_calls_of_torch_alone_stays_in_the_graph():
    float_model = made(lambda s, x: s.head(Reversed.apply(s.stem(x), s.act)), act=nn.Tanh(), **layers())
    quantized_alike(float_model, (torch.randn(2, 8),), (torch.randn(5, 8),))


def test_children_that_only_a_further_call_of_their_parent_reaches():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x: Tensor, i: int) -> Tensor:
            return self.layers[i](x) if bool((x == x).all()) else x

    float_model = made(lambda s, x: s.pair(s.pair(x, 0).relu(), 1), pair=Pair())
    q = quantized_alike(float_model, (torch.randn(2, 8),), (torch.randn(5, 8),), parts=True)
    assert octav_fx.coverage(q).share == 1


def layers() -> dict[str, nn.Module]:
    return {"stem": nn.Linear(8, 8), "block": nn.Linear(8, 8), "head": nn.Linear(8, 3)}
