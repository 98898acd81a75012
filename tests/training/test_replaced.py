"""Modules that a user puts in the places of others after quantize(): heads, adapters, fused layers."""

import copy
import dataclasses
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import octav_fx
from octav_fx import OctavError
from octav_fx.capture.held import HeldHooks
from octav_fx.capture.modules import graphs_of
from tests.support.blocks import WIDTH, batch, saved_bytes
from tests.support.blocks import Net as Blocks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.act, self.head = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(x)))


class Adapted(nn.Module):
    """What adapters do: the layer that was there, and a product beside it; its weight is to be read here."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def _same(q: nn.Module) -> nn.Module:
    return q


def _pickled(q: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def x() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("made", [_same, copy.deepcopy, _pickled])
def test_a_new_head_is_quantized_and_the_other_quantizers_stay(made: Callable[[nn.Module], nn.Module]) -> None:
    q = octav_fx.quantize(Net(), x())
    q.head = nn.Linear(16, 7)
    q = made(q)
    kept = q.quantizers.body_weight
    assert q(x()).shape == (4, 7)
    assert q.quantizers.body_weight is kept
    assert octav_fx.coverage(q) == octav_fx.Coverage(4 * 8 * 16 + 4 * 16 * 7, 4 * 8 * 16 + 4 * 16 * 7, [])
    q(x()).sum().backward()
    assert q.head.weight.grad is not None
    with octav_fx.float_mode(q):
        assert torch.equal(
            q(x()), F.linear(F.linear(x(), q.body.weight, q.body.bias).relu(), q.head.weight, q.head.bias)
        )


@pytest.mark.parametrize("made", [copy.deepcopy, _pickled])
def test_a_copy_of_a_layer_is_a_layer_and_holds_nothing_else(made: Callable[[nn.Module], nn.Module]) -> None:
    model, seen = Net(), list[Tensor]()
    prune.l1_unstructured(model.head, "weight", 0.3)
    q = octav_fx.quantize(model, x())
    alone = made(q.head)
    assert type(alone) is nn.Linear and len(pickle.dumps(alone)) < 2 * len(pickle.dumps(model.head))
    alone.register_forward_hook(lambda module, given, y: seen.append(y))
    y = alone(torch.ones(2, 16))
    assert torch.equal(y, F.linear(torch.ones(2, 16), q.head.weight_orig * q.head.weight_mask, q.head.bias))
    assert seen[0] is y
    # In a copy of all it stays what a graph reads.
    for each in (q, made(q)):
        with pytest.raises(OctavError, match="would never run this hook"):
            each.head.register_forward_hook(print)
        with pytest.raises(OctavError, match="would compute in float here"):
            each.head(torch.ones(2, 16))
        assert torch.equal(each.eval()(x()), q.eval()(x()))


def test_a_layer_without_weights_is_another_one_too() -> None:
    q = octav_fx.quantize(Net(), x())
    q.act = nn.Tanh()
    expected = Net()
    expected.act = nn.Tanh()
    expected.load_state_dict(q.state_dict())
    assert torch.equal(q(x()), octav_fx.quantize(expected, x())(x()))


def test_an_adapter_put_around_a_layer_is_not_lost() -> None:
    q = octav_fx.quantize(Net(), x())
    q.body = Adapted(q.body)
    assert octav_fx.coverage(octav_fx.quantize(Net(), x())).skipped == []
    q(x()).sum().backward()
    assert q.body.up.weight.grad is not None and q.body.base.weight.grad is not None
    assert {row.node for row in octav_fx.rows(q)} == {"body.base", "body.down", "body.up", "head"}
    # Back again: what was replaced takes hooks, as any module that no graph holds.
    adapter, q.body = q.body, q.body.base
    q(x())
    assert not isinstance(adapter._forward_hooks, HeldHooks)
    assert {row.node for row in octav_fx.rows(q)} == {"body", "head"}


def test_a_graph_of_its_own_among_blocks_and_the_python_around_them() -> None:
    q = octav_fx.quantize(Blocks(), batch(), blocks="auto")
    q(batch())
    block, graphs = q.blocks[0], [vars(part).get("octav_graphs") for part in q.blocks]
    block.up = nn.Linear(16, 24)
    block.down = nn.Linear(24, 16)
    q.head = nn.Linear(16, 16)
    assert torch.isfinite(q(batch())).all()
    after = [vars(part).get("octav_graphs") for part in q.blocks]
    assert after[0] is not graphs[0] and after[1:] == graphs[1:]
    assert octav_fx.coverage(q).skipped == []
    assert {"blocks.0.up", "head"} <= {row.node for row in octav_fx.rows(q) if row.bits}
    with octav_fx.float_mode(q):
        assert torch.equal(q.head(torch.ones(2, 16)), F.linear(torch.ones(2, 16), q.head.weight, q.head.bias))


@pytest.mark.slow
def test_adapters_in_a_model_in_one_graph_that_is_recomputed_from_now_on() -> None:
    model, x = Blocks(depth=6), torch.randn(8, 32, WIDTH)
    q, plain = (octav_fx.quantize(model, x) for _ in range(2))
    for each in (q, plain):
        torch.manual_seed(1)
        for block in each.blocks:
            block.up = Adapted(block.up)
    q.set_grad_checkpointing()
    kept = q.quantizers.blocks_0_down_weight
    assert torch.equal(q(x), plain(x))
    # Its own Python runs now, over blocks with the quantizers that were there.
    assert graphs_of(q) is None and q.blocks[0].quantizers.down_weight is kept
    assert [dataclasses.replace(row, graph="") for row in octav_fx.rows(q)] == octav_fx.rows(plain)
    assert saved_bytes(q, x, q) < saved_bytes(plain, x, plain) / 3
    gradients = [torch.autograd.grad(each(x).sum(), list(each.parameters())) for each in (q, plain)]
    assert all(map(torch.equal, *gradients))
    assert torch.equal(copy.deepcopy(q)(x), plain(x))


def test_what_asks_before_the_next_call_is_told() -> None:
    q = octav_fx.quantize(Net(), x())
    q.head = nn.Linear(16, 7)
    words = r"head of Net is another one than octav_fx\.quantize saw: call the model with a batch"
    for ask in (octav_fx.coverage, octav_fx.freeze, octav_fx.convert, lambda m: octav_fx.calibrate(m, [x()])):
        with pytest.raises(OctavError, match=words):
            ask(q)
    with octav_fx.float_mode(q):
        assert q(x()).shape == (4, 7)
    q(x())
    octav_fx.freeze(octav_fx.calibrate(q, [x()]))
    assert octav_fx.convert(q.eval())(x()).shape == (4, 7)


class Unheld(nn.Module):
    """Decides by data."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.T if x.sum() > 0 else -(x @ self.w.T)


def test_what_no_graph_holds_is_refused_and_nothing_is_changed() -> None:
    q = octav_fx.quantize(Net(), x())
    before, head = q(x()), q.head
    q.head = Unheld()
    for _ in range(2):
        with pytest.raises(OctavError, match=r"head: another one than .*, and no graph holds it"):
            q(x())
    q.head = head
    assert torch.equal(q(x()), before)


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "prune twice": lambda layer: prune.ln_structured(COMPUTED["prune"](layer), "weight", 0.2, 2, 0),
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "of one's own": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
    "pruned for good": lambda layer: prune.remove(COMPUTED["prune"](layer), "weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm` is deprecated")
@pytest.mark.parametrize("made", [_same, copy.deepcopy])
@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_computed_from_now_on(name: str, made: Callable[[nn.Module], nn.Module]) -> None:
    def changed(net: Any) -> nn.Module:
        torch.manual_seed(1)
        COMPUTED[name](net.head)
        return net

    torch.manual_seed(0)
    model = Net()
    q, expected = octav_fx.quantize(model, x()), octav_fx.quantize(changed(copy.deepcopy(model)), x())
    q = made(changed(q))
    if name != "pruned for good":
        with pytest.raises(OctavError, match=r"head.* of Net is another one than"):
            octav_fx.coverage(q)
    kept = q.quantizers.body_weight
    for each in (q, expected):
        each(x()).sum().backward()
    assert q.quantizers.body_weight is kept
    assert torch.equal(q.eval()(x()), expected.eval()(x())) and octav_fx.coverage(q) == octav_fx.coverage(expected)
    gradients = [{name: p.grad for name, p in each.named_parameters()} for each in (q, expected)]
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    octav_fx.freeze(octav_fx.calibrate(q, [x()]))
    assert torch.isfinite(octav_fx.convert(q)(x())).all()


def test_a_frozen_model_says_that_it_has_to_be_frozen_again() -> None:
    q = octav_fx.quantize(Net(), x()).eval()
    octav_fx.freeze(octav_fx.calibrate(q, [x()]))
    q.head = nn.Linear(16, 7)
    with pytest.warns(UserWarning, match="finds its clip anew in each call: calibrate and freeze again"):
        q(x())


class Layers(nn.Module):
    """Layers in containers; in parts because of what forward asks, if is_apart."""

    def __init__(self, is_apart: bool = False) -> None:
        super().__init__()
        self.layers, self.is_apart = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), is_apart
        self.more = nn.ModuleList([nn.Linear(8, 8), nn.Tanh()])

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        if self.is_apart and y.sum() > 1e9:
            return y
        for layer in self.more:
            y = layer(y)
        return y


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an activation": lambda q: q.layers.__setitem__(1, nn.Tanh()),
    "an activation taken out": lambda q: q.layers.__delitem__(1),
    "a layer": lambda q: q.layers.__setitem__(0, nn.Linear(8, 8, bias=False)),
    "a layer taken out": lambda q: q.more.pop(0),
    "an adapter": lambda q: q.layers.__setitem__(2, Adapted(q.layers[2])),
    "a layer more": lambda q: q.more.append(nn.Linear(8, 8)),
    "a weight": lambda q: setattr(q.more[0], "weight", nn.Parameter(torch.ones(8, 8))),
    "a weight that is pruned": lambda q: prune.l1_unstructured(q.layers[0], "weight", 0.5),
    "a weight that is computed": lambda q: parametrize.register_parametrization(q.layers[0], "weight", nn.Tanh()),
    "a hook on the whole": lambda q: q.register_forward_hook(lambda q, given, y: 2 * y),
}


@pytest.mark.compile
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("is_apart", [False, True])
def test_compiled_code_sees_what_is_put_in_its_place(name: str, is_apart: bool) -> None:
    torch.compiler.reset()
    q = octav_fx.quantize(Layers(is_apart), x())
    compiled = torch.compile(q, backend="eager")
    before = [compiled(x()) for _ in range(2)][1]
    CHANGES[name](q)
    found = [compiled(x()) for _ in range(2)]
    assert not torch.equal(found[0], before)
    # That one captures what it finds by itself; a new quantizer finds its clip nearer with each call.
    torch.testing.assert_close(q(x()), found[1], rtol=1e-3, atol=1e-3)


def test_compiled_code_that_nothing_was_changed_in_is_compiled_once() -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    q = octav_fx.quantize(Layers(), x())
    compiled = torch.compile(q, backend=counter, fullgraph=True)
    compiled(x())
    # Another model's child, and one that was there.
    Layers().layers[1] = nn.Tanh()
    q.layers[1] = q.layers[1]
    with pytest.raises(Unsupported):
        compiled(x())
    torch.compile(q, backend=counter)(x())
    compiled(x())
    assert counter.frame_count == 2


@pytest.mark.compile
def test_a_list_of_some_layers_that_forward_makes_breaks_no_compiled_graph() -> None:
    class First(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks[:2]:
                x = block(x)
            return self.head(x)

    torch.compiler.reset()
    q, x = octav_fx.quantize(First(), batch(), blocks="auto"), batch()
    expected = q(x)
    counter = CompileCounter()
    assert torch.equal(torch.compile(q, backend=counter, fullgraph=True)(x), expected)
    assert counter.frame_count == 1


def test_what_watches_for_changes_keeps_no_model() -> None:
    q = octav_fx.quantize(Layers(), x())
    other = copy.deepcopy(q)
    dead = [weakref.ref(q), weakref.ref(q.layers[0]), weakref.ref(other)]
    del q, other
    gc.collect()
    assert [ref() for ref in dead] == [None] * 3


def test_a_sequential_that_is_quantized_takes_and_gives_layers() -> None:
    q = octav_fx.quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), x())
    del q[1]
    q.append(nn.Linear(8, 3)).insert(1, nn.Tanh())
    q.pop(0)
    assert q(x()).shape == (4, 3)
    assert [type(layer) for layer in q] == [nn.Tanh, nn.Linear, nn.Linear]
    assert octav_fx.coverage(q) == octav_fx.Coverage(4 * (64 + 24), 4 * (64 + 24), [])


class MakesItsHead(nn.Module):
    """A layer that forward makes, as in an attribute that is None at first and in a list."""

    def __init__(self, within_list: bool) -> None:
        super().__init__()
        self.a, self.within_list, self.head, self.heads = nn.Linear(16, 16), within_list, None, nn.ModuleList()

    def forward(self, x: Tensor) -> Any:
        if self.within_list and not self.heads:
            self.heads.append(nn.Linear(16, 16))
        if not self.within_list and self.head is None:
            self.head = nn.Linear(16, 16)
        return (self.heads[0] if self.within_list else self.head)(self.a(x))


@pytest.mark.slow
@pytest.mark.parametrize("within_list", [False, True])
@pytest.mark.parametrize("is_below", [False, True])
def test_what_forward_makes_is_a_row_and_then_quantized(within_list: bool, is_below: bool) -> None:
    model, given = MakesItsHead(within_list), torch.randn(4, 16)
    q = octav_fx.quantize(nn.Sequential(model, nn.Linear(16, 16)) if is_below else model, given)
    # Of what the example made nothing is left, as of all that forward does.
    assert not any("head" in name for name, _ in q.named_parameters())
    before = octav_fx.coverage(q)
    assert before.total_macs - before.quantized_macs == 4 * 16 * 16
    q(given)
    after = octav_fx.coverage(q)
    assert after.total_macs == after.quantized_macs == before.total_macs
    found = q(given)
    with octav_fx.float_mode(q):
        assert not torch.equal(q(given), found)


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def _is_single(dtype: torch.dtype) -> bool:
    return id(dtype) == id(torch.float32)


class AsksForTheDtype(nn.Module):
    """What stands for a dtype in a trace is none by its address."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.part = nn.Linear(8, 8), Doubles()

    def forward(self, x: Tensor) -> Tensor:
        z = self.part(self.fc(x))
        return z if _is_single(z.dtype) else z.float() * 2


def test_a_graph_of_what_was_replaced_computes_what_forward_does() -> None:
    q = octav_fx.quantize(AsksForTheDtype(), torch.randn(2, 8))
    q.part = nn.Identity()
    with pytest.raises(OctavError, match=r"part: another one than .*the captured graph does not compute"):
        q(torch.randn(2, 8))


def test_a_part_that_is_compiled_says_what_to_compile() -> None:
    q: Any = octav_fx.quantize(Net(), torch.randn(2, 8))
    q.body = torch.compile(q.body, backend="eager")
    with pytest.raises(OctavError, match=r"body was given to torch\.compile, and is a part of a graph: compile the"):
        q(torch.randn(2, 8))


def test_a_module_made_of_what_another_one_holds_is_refused() -> None:
    x = torch.randn(4, 8)
    q = octav_fx.quantize(Net(), x)
    # As accelerate compiles regions: new parts, which the graph of the first module does not know.
    made = type(q).__new__(type(q))
    made.__dict__.update(vars(q))
    made._modules = {**q._modules, "body": nn.Linear(8, 16)}
    for other in (made, q._replicate_for_data_parallel()):
        with pytest.raises(OctavError, match=r"this Net was made of what another one holds.*blocks=\"auto\""):
            other(x)
    assert copy.copy(q)(x).equal(q(x))


class ChoosesByData(nn.Module):
    """By its own Python: a layer that the example leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if x.sum() < 1e9 else self.unused(x)


def test_rows_of_what_was_not_called_stay_and_nobody_sees_what_quantizing_takes() -> None:
    x = torch.randn(4, 8)
    q = octav_fx.quantize(ChoosesByData(), x)
    rows = octav_fx.coverage(q).skipped
    assert [(site, reason) for site, reason, _ in rows] == [("unused", "not called for the example inputs")]
    q.b = nn.Linear(8, 8)
    with FlopCounterMode(display=False) as counter:
        q(x)
    assert counter.get_total_flops() == 2 * 2 * 4 * 8 * 8
    assert octav_fx.coverage(q).skipped == rows
