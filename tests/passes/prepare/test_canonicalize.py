"""canonicalize: every spelling of a contraction becomes one function call that computes the same bits."""

import operator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from octav_fx.capture.guards import GuardedGraph
from octav_fx.capture.modules import QuantizedModule
from octav_fx.ir.edits import site_of
from octav_fx.ir.meta import info
from octav_fx.ir.ops import op_of
from octav_fx.ir.printer import graph_text
from octav_fx.ir.table.contractions import CONTRACTIONS
from octav_fx.ops.grouped_mm.op import grouped_product
from octav_fx.passes import canonicalize
from tests.support.graphs import captured, model, parameter, run_alike
from tests.support.layers import LAYERS, Layer
from tests.support.passes import declined, made

aten = torch.ops.aten


@dataclass(frozen=True)
class Spelling:
    """A function or method that is a contraction: the shapes of its tensors by name, and its other arguments."""

    target: Any
    tensors: dict[str, tuple[int, ...]]
    rest: dict[str, Any] = field(default_factory=dict)
    # Arguments before this one have no names.
    nameless: int = 0


def product(target: Any, first: tuple[int, ...], second: tuple[int, ...], *names: str, nameless: int = 0) -> Spelling:
    return Spelling(target, dict(zip(names, (first, second), strict=True)), nameless=nameless)


def sum_of_products(target: Any, shapes: list[tuple[int, ...]], *names: str, nameless: int = 0) -> Spelling:
    return Spelling(target, dict(zip(names, shapes, strict=True)), {"beta": 0.5, "alpha": 2.0}, nameless)


MATRICES, BATCHES = ((3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5))
# Rows of 16 bytes.
GROUPS = ((2, 3, 4), (2, 4, 8))
MATRIX_VECTOR, VECTORS = ((3, 4), (4,)), ((4,), (4,))
ADDMM, ADDMV = [(3, 5), (3, 4), (4, 5)], [(3,), (3, 4), (4,)]
ADDBMM, BADDBMM = [(3, 5), (2, 3, 4), (2, 4, 5)], [(2, 3, 5), (2, 3, 4), (2, 4, 5)]
HEADS = {"query": (2, 2, 5, 4), "key": (2, 2, 6, 4), "value": (2, 2, 6, 4)}

FUNCTIONS = [
    *(Spelling(target, layer.tensors_of(target), layer.rest) for layer in LAYERS for target in layer.functions),
    *(product(target, (2, 3, 4), (4, 5), "input", "other") for target in (torch.matmul, torch.linalg.matmul)),
    *(product(target, *MATRICES, "input", "other", nameless=2) for target in (operator.matmul, operator.imatmul)),
    product(torch.mm, *MATRICES, "input", "mat2"),
    product(torch.bmm, *BATCHES, "input", "mat2"),
    product(torch.mv, *MATRIX_VECTOR, "input", "vec"),
    product(torch.dot, *VECTORS, "input", "tensor"),
    product(aten.matmul.default, (2, 3, 4), (4, 5), "self", "other"),
    product(aten.mm.default, *MATRICES, "self", "mat2"),
    product(aten.bmm.default, *BATCHES, "self", "mat2"),
    product(aten.mv.default, *MATRIX_VECTOR, "self", "vec"),
    product(aten.dot.default, *VECTORS, "self", "tensor"),
    sum_of_products(torch.addmm, ADDMM, "input", "mat1", "mat2"),
    sum_of_products(aten.addmm.default, ADDMM, "self", "mat1", "mat2"),
    sum_of_products(torch.addmv, ADDMV, "input", "mat", "vec"),
    sum_of_products(aten.addmv.default, ADDMV, "self", "mat", "vec"),
    sum_of_products(torch.addbmm, ADDBMM, "input", "batch1", "batch2"),
    sum_of_products(aten.addbmm.default, ADDBMM, "self", "batch1", "batch2"),
    sum_of_products(torch.baddbmm, BADDBMM, "input", "batch1", "batch2"),
    sum_of_products(aten.baddbmm.default, BADDBMM, "self", "batch1", "batch2"),
    product(grouped_product, *GROUPS, "mat_a", "mat_b"),
    product(F.grouped_mm, *GROUPS, "mat_a", "mat_b"),
    product(torch._grouped_mm, *GROUPS, "input", "mat2"),
    product(aten._grouped_mm.default, *GROUPS, "self", "mat2"),
    Spelling(F.scaled_dot_product_attention, HEADS, {"scale": 0.3}),
    Spelling(aten.scaled_dot_product_attention.default, HEADS, {"scale": 0.3}),
]
METHODS = [
    product("matmul", (2, 3, 4), (4, 5), "self", "other", nameless=1),
    product("mm", *MATRICES, "self", "mat2", nameless=1),
    product("bmm", *BATCHES, "self", "mat2", nameless=1),
    product("mv", *MATRIX_VECTOR, "self", "vec", nameless=1),
    product("dot", *VECTORS, "self", "tensor", nameless=1),
    product("__matmul__", *MATRICES, "self", "other", nameless=2),
    sum_of_products("addmm", ADDMM, "self", "mat1", "mat2", nameless=1),
    sum_of_products("addmv", ADDMV, "self", "mat", "vec", nameless=1),
    sum_of_products("addbmm", ADDBMM, "self", "batch1", "batch2", nameless=1),
    sum_of_products("baddbmm", BADDBMM, "self", "batch1", "batch2", nameless=1),
]
MODULES = [layer for layer in LAYERS if layer.module is not None]
# Neither has a function of this name, and einsum has no operand names: they have tests of their own below.
ELSEWHERE = {torch.einsum, torch.functional.einsum, "__imatmul__"}


def test_every_spelling_of_every_row_has_a_case() -> None:
    cases = {case.target for case in (*FUNCTIONS, *METHODS)} | {layer.module for layer in MODULES} | ELSEWHERE
    spellings = {s for op in CONTRACTIONS for s in (op.target, *op.functions, *op.methods, *op.modules)}
    assert spellings == cases


def call_graph(case: Spelling, positional: int) -> tuple[QuantizedModule, list[torch.Tensor], fx.Node]:
    """A graph of this one call, its first arguments by position and the rest by name; and inputs for it."""
    graph = fx.Graph()
    nodes = {name: graph.placeholder(f"t{i}") for i, name in enumerate(case.tensors)}
    args = tuple(nodes.values())[:positional]
    kwargs = dict(list(nodes.items())[positional:]) | case.rest
    if positional > len(nodes):
        args, kwargs = (*nodes.values(), *case.rest.values()), {}
    call = graph.call_method if isinstance(case.target, str) else graph.call_function
    node = call(case.target, args, kwargs)
    graph.output(node)
    inputs = [torch.randn(shape) for shape in case.tensors.values()]
    return QuantizedModule(nn.Module(), {mode: [GuardedGraph(graph)] for mode in (True, False)}, {}), inputs, node


def ways_to_call() -> list[Any]:
    """Each spelling with each number of positional arguments, and all of them where the rest has positions too."""
    ways = []
    for case in (*FUNCTIONS, *METHODS):
        name = case.target if isinstance(case.target, str) else getattr(case.target, "__name__", str(case.target))
        numbers = list(range(case.nameless, len(case.tensors) + 1))
        if "groups" in case.rest:
            numbers.append(len(case.tensors) + 1)
        ways += [pytest.param(case, n, id=f"{name}-{n}") for n in numbers]
    return ways


@pytest.mark.parametrize(("case", "positional"), ways_to_call())
def test_a_call_becomes_the_canonical_function_with_its_operands_in_place(case: Spelling, positional: int) -> None:
    gm, inputs, node = call_graph(case, positional)
    op, before = op_of(node), gm(*inputs)
    made(gm, canonicalize)

    (call,) = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert (call.target, call.name) == (op.target, node.name)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for operand in op.operands:
        assert call.args[operand.index] is placeholders[operand.index]
    assert torch.equal(gm(*inputs), before)
    text = graph_text(gm.graph)
    assert made(gm, canonicalize) == [] and graph_text(gm.graph) == text


@pytest.mark.parametrize("layer", MODULES, ids=lambda layer: layer.module.__name__)
@pytest.mark.parametrize("by_name", [False, True])
def test_a_module_becomes_the_canonical_function(layer: Layer, by_name: bool) -> None:
    def call(part: nn.Module, *given: torch.Tensor) -> torch.Tensor:
        return part(**dict(zip(layer.inputs, given, strict=True))) if by_name else part(*given)

    forward = (lambda s, x: call(s.part, x)) if len(layer.inputs) == 1 else (lambda s, x, y: call(s.part, x, y))
    inputs = dict(zip("xy", map(torch.randn, layer.inputs.values()), strict=False))
    float_module = model(forward, part=layer.module(*layer.arguments))
    gm = captured(float_module, **inputs)
    (node,) = [n for n in gm.graph.nodes if n.op == "call_module"]
    op, before = op_of(node), gm(**inputs)
    assert [(edit.node, edit.verb) for edit in made(gm, canonicalize)] == [("part", "canonicalize")]

    *sources, weight, bias, new, output = gm.graph.nodes
    assert (new.target, new.args, new.kwargs) == (op.target, (*sources, weight, bias, *layer.module_rest), {})
    assert (weight.target, bias.target, output.args) == ("part.weight", "part.bias", (new,))
    assert torch.equal(gm(**inputs), before) and torch.equal(before, float_module(**inputs))
    assert made(gm, canonicalize) == []


CONVOLUTIONS = {
    "no bias": nn.Conv2d(4, 6, 3, bias=False),
    "grouped": nn.Conv2d(4, 8, 3, groups=4),
    "strided and dilated": nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2),
    "padding='same'": nn.Conv2d(4, 6, 5, padding="same"),
    "padding='valid'": nn.Conv2d(4, 6, 3, padding="valid"),
    "reflect": nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"),
    "replicate": nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"),
    "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "circular and 'same'": nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular"),
    "reflect 1d": nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"),
    "circular 3d": nn.Conv3d(4, 6, 2, padding=1, padding_mode="circular"),
    "transposed, grouped, no bias": nn.ConvTranspose2d(4, 8, 3, stride=2, groups=4, bias=False),
    "linear, no bias": nn.Linear(6, 5, bias=False),
    "linear under MultiheadAttention": nn.MultiheadAttention(4, 2).out_proj,
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_module_with_options_computes_the_same_bits(name: str) -> None:
    part = CONVOLUTIONS[name]
    dims = {nn.Conv1d: 1, nn.Conv3d: 3}.get(type(part), 2)
    shape = (2, part.in_features) if isinstance(part, nn.Linear) else (2, 4) + (6,) * dims
    x = torch.randn(shape)
    gm = captured(nn.Sequential(part), input=x)
    assert len(made(gm, canonicalize)) == 1
    assert not any(node.op == "call_module" for node in gm.graph.nodes)
    assert torch.equal(gm(x), part(x))
    assert made(gm, canonicalize) == []


def test_golden() -> None:
    def forward(self, x, y):
        y = self.conv(y).flatten(2)
        y = torch.einsum("bcn,bdn->bcd", [y, y])
        return (self.fc(x) @ self.mix).bmm(mat2=y)

    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False)
    float_module = model(forward, conv=conv, fc=nn.Linear(4, 5), mix=parameter(5, 3))
    x, y = torch.randn(2, 6, 4), torch.randn(2, 2, 5, 5)
    gm = captured(float_module, x=x, y=y)
    assert graph_text(gm.graph) == (
        "conv = self.conv(y)\n"
        "flatten = conv.flatten(2)\n"
        "einsum = einsum('bcn,bdn->bcd', flatten, flatten)\n"
        "fc = self.fc(x)\n"
        "mix = self.mix\n"
        "matmul = matmul(fc, mix)\n"
        "bmm = matmul.bmm(mat2=einsum)\n"
        "return bmm"
    )
    before = gm(x, y)
    made(gm, canonicalize)
    assert graph_text(gm.graph) == (
        "conv_weight = self.conv.weight\n"
        "pad = pad(y, (1, 1, 1, 1), mode='reflect')\n"
        "conv = conv2d(pad, conv_weight, None, (1, 1), (0, 0), (1, 1), 1)\n"
        "flatten = conv.flatten(2)\n"
        "einsum = einsum('bcn,bdn->bcd', flatten, flatten)\n"
        "fc_weight = self.fc.weight\n"
        "fc_bias = self.fc.bias\n"
        "fc = linear(x, fc_weight, fc_bias)\n"
        "mix = self.mix\n"
        "matmul = matmul(fc, mix)\n"
        "bmm = matmul(matmul, einsum)\n"
        "return bmm"
    )
    assert torch.equal(gm(x, y), before)


@pytest.mark.parametrize("target", [torch.einsum, torch.functional.einsum])
@pytest.mark.parametrize("listed", [False, True])
def test_einsum_takes_its_operands_one_by_one(target: Any, listed: bool) -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output(graph.call_function(target, ("ij,jk->ik", [x, y]) if listed else ("ij,jk->ik", x, y)))
    gm = QuantizedModule(nn.Module(), {mode: [GuardedGraph(graph)] for mode in (True, False)}, {})
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    before = gm(a, b)
    made(gm, canonicalize)
    assert graph_text(gm.graph).splitlines()[0] == "einsum = einsum('ij,jk->ik', x, y)"
    assert torch.equal(gm(a, b), before)
    assert made(gm, canonicalize) == []


def test_the_in_place_method_is_no_method_of_a_tensor() -> None:
    # So no graph that runs can hold it; Dynamo writes __matmul__ for @=.
    assert not hasattr(torch.Tensor, "__imatmul__")


def test_out_stays_because_it_names_the_memory_to_write() -> None:
    x, y = torch.randn(3, 4), torch.randn(4, 5)
    gm = captured(model(lambda self, x, y: torch.mm(x, y, out=x.new_empty(3, 5))), x=x, y=y)
    text = graph_text(gm.graph)
    assert declined(gm, canonicalize) == [("matmul", None, "writes into out=")]
    assert graph_text(gm.graph) == text


@pytest.mark.parametrize("by_name", [False, True])
def test_output_size_stays_because_the_module_computes_its_padding(by_name: bool) -> None:
    forward = (lambda self, x: self.up(x, output_size=[8])) if by_name else (lambda self, x: self.up(x, [8]))
    x = torch.randn(1, 2, 4)
    gm = captured(model(forward, up=nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1)), x=x)
    text = graph_text(gm.graph)
    assert declined(gm, canonicalize) == [("up", None, "called with output_size")]
    assert graph_text(gm.graph) == text
    assert gm(x).shape == (1, 3, 8)


def test_a_subclass_with_a_forward_of_its_own_is_traced_through() -> None:
    class Standardized(nn.Conv1d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2), keepdim=True)
            return F.conv1d(x, weight, self.bias, self.stride)

    x = torch.randn(2, 3, 8)
    float_module = nn.Sequential(Standardized(3, 4, 3))
    gm = captured(float_module, input=x)
    made(gm, canonicalize)
    assert torch.equal(gm(x), float_module(x))
    assert [node.name for node in gm.graph.nodes if node.op == "get_attr"] == ["_0_weight", "_0_bias"]


def test_a_subclass_that_keeps_the_forward_is_the_module_it_extends() -> None:
    class Named(nn.Linear):
        pass

    x = torch.randn(2, 3)
    gm = captured(nn.Sequential(Named(3, 4)), input=x)
    assert len(made(gm, canonicalize)) == 1


def test_a_module_called_twice_reads_its_parameters_once() -> None:
    x = torch.randn(2, 4)
    float_module = model(lambda self, x: self.fc(self.fc(x)), fc=nn.Linear(4, 4))
    gm = captured(float_module, x=x)
    made(gm, canonicalize)
    assert graph_text(gm.graph) == (
        "fc_weight = self.fc.weight\n"
        "fc_bias = self.fc.bias\n"
        "fc = linear(x, fc_weight, fc_bias)\n"
        "fc_1 = linear(fc, fc_weight, fc_bias)\n"
        "return fc_1"
    )
    assert [site_of(node) for node in gm.graph.nodes if node.op == "call_function"] == ["fc", "fc:1"]
    assert torch.equal(gm(x), float_module(x))


def test_tied_weights_are_one_node_wherever_they_are_read_first() -> None:
    embed, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embed.weight
    float_module = model(
        lambda self, i: self.head(self.embed(i)) + F.linear(self.embed(i), self.embed.weight), embed=embed, head=head
    )
    i = torch.arange(3)
    gm = captured(float_module, i=i)
    made(gm, canonicalize)
    assert graph_text(gm.graph) == (
        "embed = self.embed(i)\n"
        "embed_weight = self.embed.weight\n"
        "head = linear(embed, embed_weight, None)\n"
        "embed_1 = self.embed(i)\n"
        "linear = linear(embed_1, embed_weight)\n"
        "add = add(head, linear)\n"
        "return add"
    )
    assert torch.equal(gm(i), float_module(i))


def test_sites_are_the_names_that_users_know() -> None:
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.weight = nn.Linear(4, 4), parameter(4, 4)

        def forward(self, x):
            return F.linear(self.proj(x) @ x.transpose(-1, -2) @ x, self.weight)

    float_module = model(
        lambda self, x: (
            F.linear(self.blocks[1](self.blocks[0](x)), self.head.weight, self.head.bias) @ F.linear(x, self.loose)
        ),
        blocks=nn.ModuleList([Block(), Block()]),
        head=nn.Linear(4, 4),
        loose=parameter(4, 4),
    )
    gm = captured(float_module, x=torch.randn(4, 4))
    made(gm, canonicalize)
    sites = [site_of(node) for node in gm.graph.nodes if info(node).site is not None]
    assert sites == [
        *("blocks.0.proj", "blocks.0.matmul", "blocks.0.matmul:1", "blocks.0"),
        *("blocks.1.proj", "blocks.1.matmul", "blocks.1.matmul:1", "blocks.1"),
        *("head", "linear", "matmul"),
    ]


def test_other_nodes_stay_as_they_are() -> None:
    x = torch.randn(2, 4)
    gm = captured(model(lambda self, x: self.act(self.norm(x)) + x, act=nn.GELU(), norm=nn.LayerNorm(4)), x=x)
    text = graph_text(gm.graph)
    assert made(gm, canonicalize) == [] and graph_text(gm.graph) == text


def test_the_float_module_runs_as_before() -> None:
    x = torch.randn(2, 3, 6, 6)
    float_module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    state, before = dict(float_module.state_dict()), float_module(x)
    gm = captured(float_module, input=x)
    made(gm, canonicalize)
    assert run_alike(float_module, lambda x: before, x)
    assert all(torch.equal(float_module.state_dict()[name], value) for name, value in state.items())
