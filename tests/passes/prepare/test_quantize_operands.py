"""quantize_operands: a quantizer of the right role, axis and sign before each operand; elsewhere a reason."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from octav_fx.capture.guards import GuardedGraph
from octav_fx.capture.modules import QuantizedModule
from octav_fx.capture.rerun import without_quantizers
from octav_fx.errors import OctavError
from octav_fx.ir.op import Role
from octav_fx.ir.printer import graph_text
from octav_fx.ir.records import records
from octav_fx.ir.table.contractions import CONTRACTIONS
from octav_fx.nn import FakeQuantizer, Settings
from octav_fx.passes import Place, quantize_operands
from tests.support.graphs import model, parameter
from tests.support.layers import LAYERS, Layer
from tests.support.passes import canonical, four_bits, made, on_grid, quantize_with
from tests.support.settings import settings_of


def places(gm: QuantizedModule) -> list[Place]:
    """What the pass asks about each operand."""
    seen: list[Place] = []

    def choose(place: Place) -> Settings:
        seen.append(place)
        return four_bits(place)

    made(gm, quantize_with(choose))
    return seen


@dataclass(frozen=True)
class Case:
    """A contraction of an input x with parameters, and what each of its operands has to be."""

    function: Callable[..., Any]
    # Arguments by position: "x" the input, "r" its relu, a name an attribute of the model; else themselves.
    arguments: tuple[Any, ...]
    # Position of the argument -> (operand, role, signed, axis).
    expected: dict[int, tuple[str, Role, bool, int | None]]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def call(self, owner: nn.Module, x: Tensor) -> list[Any]:
        known = {"x": x, "r": x.relu()} if "r" in self.arguments else {"x": x}
        return [known.get(a, getattr(owner, a, a)) if isinstance(a, str) else a for a in self.arguments]


A, W = Role.ACTIVATION, Role.WEIGHT


def case_of(layer: Layer) -> Case:
    """The relu of an input is unsigned; a second input of the same shape is signed."""
    (first, *further), tensors = layer.inputs, list(layer.tensors)
    expected = {0: (first, A, False, None), **{i + 1: (name, A, True, None) for i, name in enumerate(further)}}
    expected[len(layer.inputs)] = ("weight", W, True, layer.channel)
    arguments = ("r", *("x" for _ in further), *layer.state, *layer.rest.values())
    assert tensors[len(layer.inputs)] == "weight" and {layer.inputs[first]} == set(layer.inputs.values())
    return Case(layer.functions[0], arguments, expected, {"x": layer.inputs[first], **layer.state})


CASES = {
    **{layer.op: [case_of(layer)] for layer in LAYERS},
    "matmul": [
        Case(torch.matmul, ("r", "x"), {0: ("input", A, False, None), 1: ("other", A, True, None)}, {"x": (4, 4)}),
        Case(
            torch.matmul,
            ("x", "w"),
            {0: ("input", A, True, None), 1: ("other", W, True, 2)},
            {"x": (2, 3, 4), "w": (2, 4, 5)},
        ),
        Case(
            torch.matmul,
            ("w", "r"),
            {0: ("input", W, True, 0), 1: ("other", A, False, None)},
            {"x": (2, 4, 3), "w": (5, 4)},
        ),
        # A vector has no axis but the one that is summed over.
        Case(
            torch.matmul,
            ("x", "w"),
            {0: ("input", A, True, None), 1: ("other", W, True, None)},
            {"x": (3, 4), "w": (4,)},
        ),
    ],
    "addmm": [
        Case(
            torch.addmm,
            ("b", "x", "w"),
            {1: ("mat1", A, True, None), 2: ("mat2", W, True, 1)},
            {"x": (3, 4), "w": (4, 5), "b": (5,)},
        ),
        Case(
            torch.addmm,
            ("b", "w", "r"),
            {1: ("mat1", W, True, 0), 2: ("mat2", A, False, None)},
            {"x": (4, 3), "w": (5, 4), "b": (3,)},
        ),
    ],
    "addmv": [
        Case(
            torch.addmv,
            ("b", "x", "w"),
            {1: ("mat", A, True, None), 2: ("vec", W, True, None)},
            {"x": (3, 4), "w": (4,), "b": (3,)},
        ),
        Case(
            torch.addmv,
            ("b", "w", "r"),
            {1: ("mat", W, True, 0), 2: ("vec", A, False, None)},
            {"x": (4,), "w": (3, 4), "b": (3,)},
        ),
    ],
    "addbmm": [
        Case(
            torch.addbmm,
            ("b", "x", "w"),
            {1: ("batch1", A, True, None), 2: ("batch2", W, True, 2)},
            {"x": (2, 3, 4), "w": (2, 4, 5), "b": (5,)},
        )
    ],
    "baddbmm": [
        Case(
            torch.baddbmm,
            ("b", "w", "x"),
            {1: ("batch1", W, True, 1), 2: ("batch2", A, True, None)},
            {"x": (2, 4, 5), "w": (2, 3, 4), "b": (5,)},
        )
    ],
    "grouped_mm": [
        Case(
            F.grouped_mm,
            ("r", "w"),
            {0: ("mat_a", A, False, None), 1: ("mat_b", W, True, 2)},
            {"x": (2, 3, 4), "w": (2, 4, 8)},
        ),
        Case(
            F.grouped_mm,
            ("w", "x"),
            {0: ("mat_a", W, True, 1), 1: ("mat_b", A, True, None)},
            {"x": (2, 4, 8), "w": (2, 3, 4)},
        ),
    ],
    "einsum": [
        Case(
            torch.einsum,
            ("ij,kj,jl->ikl", "x", "w", "r"),
            {1: ("operand0", A, True, None), 2: ("operand1", W, True, None), 3: ("operand2", A, False, None)},
            {"x": (4, 4), "w": (5, 4)},
        )
    ],
    "attention": [
        Case(
            F.scaled_dot_product_attention,
            ("x", "x", "r", "w"),
            {0: ("query", A, True, None), 1: ("key", A, True, None), 2: ("value", A, False, None)},
            {"x": (2, 3, 4), "w": (3, 3)},
        )
    ],
}


def test_every_contraction_has_a_case() -> None:
    assert set(CASES) == {op.name for op in CONTRACTIONS}
    for op in CONTRACTIONS:
        operands = {operand for case in CASES[op.name] for operand, *_ in case.expected.values()}
        assert operands >= {operand.name for operand in op.operands} - {"operand"}


@pytest.mark.parametrize(("op", "case"), [pytest.param(op, c, id=op) for op, cases in CASES.items() for c in cases])
def test_operands_get_their_role_axis_and_sign(op: str, case: Case) -> None:
    parts = {name: parameter(*shape) for name, shape in case.shapes.items() if name != "x"}
    float_module = model(lambda self, x: case.function(*case.call(self, x)), **parts)
    x = torch.randn(case.shapes["x"])
    gm = canonical(float_module, x=x)
    assert [(p.op, p.operand, p.role, p.signed, p.dim) for p in places(gm)] == [
        (op, *expected) for expected in case.expected.values()
    ]

    by_hand = case.call(float_module, x)
    for position, (_, _, signed, dim) in case.expected.items():
        by_hand[position] = on_grid(by_hand[position], signed, dim)
    assert torch.equal(gm(x), case.function(*by_hand))
    with without_quantizers(gm):
        assert torch.equal(gm(x), float_module(x))
    text = graph_text(gm.graph)
    assert made(gm, quantize_with(four_bits)) == [] and graph_text(gm.graph) == text


def test_golden() -> None:
    def forward(self, x):
        y = self.block.conv(x).relu().flatten(2)
        return self.fc(y @ y.transpose(1, 2))

    block = nn.Module()
    block.conv = nn.Conv2d(2, 3, 3)
    gm = canonical(model(forward, block=block, fc=nn.Linear(3, 4, bias=False)), x=torch.randn(1, 2, 5, 5))
    edits = made(gm, quantize_with(four_bits))
    assert graph_text(gm.graph) == (
        "block_conv_weight = self.block.conv.weight\n"
        "block_conv_bias = self.block.conv.bias\n"
        "quantizers_block_conv_input = self.quantizers.block_conv_input(x)\n"
        "quantizers_block_conv_weight = self.quantizers.block_conv_weight(block_conv_weight)\n"
        "block_conv = conv2d(quantizers_block_conv_input, quantizers_block_conv_weight, block_conv_bias, "
        "(1, 1), (0, 0), (1, 1), 1)\n"
        "relu = block_conv.relu()\n"
        "flatten = relu.flatten(2)\n"
        "transpose = flatten.transpose(1, 2)\n"
        "quantizers_matmul_input = self.quantizers.matmul_input(flatten)\n"
        "quantizers_matmul_other = self.quantizers.matmul_other(transpose)\n"
        "matmul = matmul(quantizers_matmul_input, quantizers_matmul_other)\n"
        "fc_weight = self.fc.weight\n"
        "quantizers_fc_input = self.quantizers.fc_input(matmul)\n"
        "quantizers_fc_weight = self.quantizers.fc_weight(fc_weight)\n"
        "fc = linear(quantizers_fc_input, quantizers_fc_weight, None)\n"
        "return fc"
    )
    assert [(edit.node, edit.operand, edit.detail) for edit in edits] == [
        (site, operand, "4 bits")
        for site, operands in {
            "block.conv": ("input", "weight"),
            "matmul": ("input", "other"),
            "fc": ("input", "weight"),
        }.items()
        for operand in operands
    ]
    assert gm.quantizers.block_conv_weight.settings == settings_of(4, True, 0, "octav", "pwl")
    assert gm.quantizers.matmul_other.settings == settings_of(4, False, None, "octav", "pwl")
    assert gm.quantizers.block_conv_weight.hint.shape == (3,)


def test_edges_are_marked() -> None:
    def forward(self, x):
        return self.last(self.inner(self.second(self.first(x)).flatten(1)))

    parts = {
        "first": nn.Conv2d(1, 2, 3),
        "second": nn.Conv2d(2, 2, 3),
        "inner": nn.Linear(8, 4),
        "last": nn.Linear(4, 2),
    }
    found = {place.site: place.edge for place in places(canonical(model(forward, **parts), x=torch.randn(1, 1, 6, 6)))}
    assert found == {"first": True, "second": False, "inner": False, "last": True}


def test_both_operands_of_a_product_with_itself_are_quantized() -> None:
    gm = canonical(model(lambda self, x: torch.matmul(x, x)), x=torch.randn(3, 3))
    made(gm, quantize_with(four_bits))
    assert graph_text(gm.graph) == (
        "quantizers_matmul_input = self.quantizers.matmul_input(x)\n"
        "quantizers_matmul_other = self.quantizers.matmul_other(x)\n"
        "matmul = matmul(quantizers_matmul_input, quantizers_matmul_other)\n"
        "return matmul"
    )


COMPUTED_WEIGHTS = {
    "parameter": (lambda self, x: x @ self.w, {"w": parameter(4, 5)}, 1),
    "transposed parameter": (lambda self, x: x @ self.w.t(), {"w": parameter(5, 4)}, 1),
    "buffer": (lambda self, x: x @ self.w, {"w": torch.randn(4, 5)}, 1),
    "scaled": (lambda self, x: F.linear(x, self.w * self.s), {"w": parameter(5, 4), "s": parameter(5, 1)}, 0),
    "LoRA": (
        lambda self, x: F.linear(x, self.w + self.b @ self.a),
        {"w": parameter(5, 4), "a": parameter(2, 4), "b": parameter(5, 2)},
        0,
    ),
    "weight_norm": (lambda self, x: self.fc(x), {"fc": parametrizations.weight_norm(nn.Linear(4, 5))}, 0),
    "spectral_norm": (lambda self, x: self.fc(x), {"fc": parametrizations.spectral_norm(nn.Linear(4, 5))}, 0),
}


# fx warns that it knows no attribute of this name: it is a property.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("name", COMPUTED_WEIGHTS)
def test_what_is_computed_from_parameters_alone_is_a_weight(name: str) -> None:
    forward, parts, axis = COMPUTED_WEIGHTS[name]
    float_module, x = model(forward, **parts), torch.randn(3, 4, requires_grad=True)
    gm = canonical(float_module, x=x)
    *_, last_input, last_weight = places(gm)
    assert (last_input.role, last_input.dim) == (A, None)
    assert (last_weight.role, last_weight.dim, last_weight.signed) == (W, axis, True)
    with without_quantizers(gm):
        assert torch.equal(gm(x), float_module(x))
    # Gradients go on to whatever the weight is computed from.
    gm(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (x, *float_module.parameters()) if p.dim() > 1)


def test_both_factors_of_lora_are_weights() -> None:
    forward, parts, _ = COMPUTED_WEIGHTS["LoRA"]
    found = [(p.operand, p.role, p.dim) for p in places(canonical(model(forward, **parts), x=torch.randn(3, 4)))]
    assert found == [("input", W, 0), ("other", W, 1), ("input", A, None), ("weight", W, 0)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8])
def test_an_operand_that_is_not_floating_point_is_an_error_that_names_it(dtype: torch.dtype) -> None:
    gm = canonical(
        model(lambda self, x: self.inner(x), inner=model(lambda self, x: x.to(dtype) @ x.to(dtype))), x=torch.ones(3, 3)
    )
    kind = str(dtype).replace(".", r"\.")
    with pytest.raises(OctavError, match=rf"inner\.matmul: input has dtype {kind} and shape \(3, 3\)"):
        made(gm, quantize_with(four_bits))


def test_a_reason_instead_of_a_spec_leaves_the_operand_float() -> None:
    def choose(place: Place) -> Settings | str:
        return "not this one" if place.operand == "input" else four_bits(place)

    float_module, x = model(lambda self, x: self.fc(x), fc=nn.Linear(4, 5)), torch.randn(2, 4)
    gm = canonical(float_module, x=x)
    edits = quantize_operands(gm, choose)
    gm.recompile()
    assert [(e.node, e.verb, e.operand, e.detail) for e in edits if e.declined] == [
        ("fc", "skip", "input", "not this one")
    ]
    assert "linear(x, quantizers_fc_weight, fc_bias)" in graph_text(gm.graph)
    assert torch.equal(gm(x), F.linear(x, on_grid(gm.fc.weight, True, 0), gm.fc.bias))
    assert [(r.operand, r.quantizer, r.reason) for r in records(gm.graph, edits)] == [
        ("input", None, "not this one"),
        ("weight", "quantizers.fc_weight", None),
    ]


def test_refused_everywhere_the_graph_is_as_it_was() -> None:
    gm = canonical(model(lambda self, x: self.fc(x @ x), fc=nn.Linear(4, 5)), x=torch.randn(4, 4))
    text = graph_text(gm.graph)
    assert made(gm, quantize_with(lambda place: "no")) == []
    assert graph_text(gm.graph) == text and not list(gm.quantizers.children())


WITHOUT_RULE = {
    "GRU": (model(lambda self, x: self.cell(x)[0], cell=nn.GRU(4, 3)), "cell", "GRU"),
    "cdist": (model(lambda self, x: torch.cdist(x.flatten(0, 1), x.flatten(0, 1))), "cdist", "cdist"),
}


@pytest.mark.parametrize("name", WITHOUT_RULE)
def test_what_no_rule_covers_stays_float_with_its_reason_and_its_macs(name: str) -> None:
    float_module, site, kind = WITHOUT_RULE[name]
    gm = canonical(float_module, x=torch.randn(2, 3, 4))
    text = graph_text(gm.graph)
    edits = quantize_operands(gm, four_bits)
    assert [(e.node, e.verb, e.detail) for e in edits] == [(site, "skip", f"no rule for {kind}")]
    assert graph_text(gm.graph) == text
    (record,) = records(gm.graph, edits)
    # GRU: 2 * 3 steps of three gates, each 4 * 3 + 3 * 3. The others: all pairs of 6 rows of 4.
    macs = 2 * 3 * 3 * (12 + 9) if name == "GRU" else 36 * 4
    assert (record.site, record.quantizer, record.reason, record.macs) == (site, None, f"no rule for {kind}", macs)


def test_a_contraction_that_canonicalize_left_is_left() -> None:
    gm = canonical(model(lambda self, x: torch.mm(x, x.T, out=x.new_empty(2, 2))), x=torch.randn(2, 4))
    text = graph_text(gm.graph)
    assert made(gm, quantize_with(four_bits)) == [] and graph_text(gm.graph) == text


# Forward functions of x [2, 3], frequencies f [4] and a table [3, 4] as buffers, w a parameter [3, 4].
CONSTANT = {
    "positions times frequencies": lambda s, x: (
        x + torch.outer(torch.arange(2.0), s.f)[:, :3] + (torch.arange(2.0)[:, None] @ s.f[None])[:, :3]
    ),
    "buffers alone": lambda s, x: x + (s.table @ s.table.t())[:2],
    "an integer input": lambda s, x, i: x + (i[:, None].float() @ s.f[None])[:, :3],
}
VALUED = {
    "a parameter": lambda s, x: x + (s.table @ s.w.t())[:2],
    "an input and a buffer": lambda s, x: x @ s.table,
    "an embedding": lambda s, i: s.embedding(i) @ s.table,
}
PARTS = {"f": torch.randn(4), "table": torch.randn(3, 4), "w": parameter(3, 4), "embedding": nn.Embedding(5, 3)}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_product_of_integers_and_buffers_stays_float_with_its_reason(name: str) -> None:
    i = {"i": torch.tensor([1, 4])} if "integer" in name else {}
    gm = canonical(model(CONSTANT[name], **PARTS), x=torch.randn(2, 3), **i)
    text = graph_text(gm.graph)
    edits = quantize_operands(gm, four_bits)
    assert [(e.node, e.verb, e.detail) for e in edits] == [
        ("matmul", "skip", "computed from integers and constants, nothing is learned or measured here")
    ]
    assert graph_text(gm.graph) == text
    assert {r.reason for r in records(gm.graph, edits)} == {edits[0].detail}


@pytest.mark.parametrize("name", VALUED)
def test_a_product_that_a_parameter_or_an_input_reaches_is_quantized(name: str) -> None:
    arguments = {"i": torch.tensor([1, 4])} if "embedding" in name else {"x": torch.randn(2, 3)}
    gm = canonical(model(VALUED[name], **PARTS), **arguments)
    assert [place.operand for place in places(gm)] == ["input", "other"]


def test_rows_sorted_by_expert_times_their_experts_weights() -> None:
    def forward(self, x, ends):
        return F.grouped_mm(x, self.w, offs=ends)

    float_module, x = model(forward, w=parameter(3, 4, 8)), torch.randn(6, 4)
    ends = torch.tensor([1, 5, 6], dtype=torch.int32)
    gm = canonical(float_module, x=x, ends=ends)
    made(gm, quantize_with(four_bits))
    by_hand = F.grouped_mm(on_grid(x, True, None), on_grid(float_module.w, True, 2), offs=ends)
    assert torch.equal(gm(x, ends), by_hand)
    assert not torch.equal(by_hand, float_module(x, ends))
    # Each row meets the weights of one expert.
    assert {r.macs for r in records(gm.graph, [])} == {6 * 4 * 8}


def test_einsum_of_one_operand_multiplies_nothing() -> None:
    gm = canonical(model(lambda self, x: torch.einsum("ij->ji", x)), x=torch.randn(2, 3))
    assert places(gm) == []


def test_a_bias_a_mask_and_what_is_added_stay_float() -> None:
    def forward(self, x, mask):
        x = torch.baddbmm(x, x, x)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    gm = canonical(model(forward), x=torch.randn(2, 3, 3), mask=torch.zeros(3, 3))
    made(gm, quantize_with(four_bits))
    text = graph_text(gm.graph)
    assert "baddbmm(x, quantizers_" in text and "attn_mask=mask" in text


def test_quantizers_of_one_name_count_on() -> None:
    # "a.b" and "a_b" are different sites, and their quantizers share a base name.
    inner = nn.Module()
    inner.b = nn.Linear(4, 4)
    gm = canonical(model(lambda self, x: self.a.b(self.a_b(x)), a=inner, a_b=nn.Linear(4, 4)), x=torch.randn(2, 4))
    made(gm, quantize_with(four_bits))
    assert [name for name, _ in gm.quantizers.named_children()] == [
        "a_b_input",
        "a_b_weight",
        "a_b_input_1",
        "a_b_weight_1",
    ]


def test_the_graph_of_the_other_mode_takes_the_quantizers_that_are_there() -> None:
    float_module, x = model(lambda self, x: self.fc(x), fc=nn.Linear(4, 4)), torch.randn(2, 4)
    one, other = (canonical(float_module, x=x).graph for _ in range(2))
    gm = QuantizedModule(float_module, {False: [GuardedGraph(one)], True: [GuardedGraph(other)]}, {})
    made(gm, quantize_with(four_bits))
    gm.graph = other
    made(gm, quantize_with(four_bits))
    assert graph_text(one) == graph_text(other)
    assert [name for name, _ in gm.quantizers.named_children()] == ["fc_input", "fc_weight"]


def test_another_batch_size_runs() -> None:
    float_module = model(
        lambda self, x: torch.einsum("bij,jk->bik", self.fc(x) @ x.transpose(1, 2), self.w),
        fc=nn.Linear(4, 4),
        w=parameter(3, 3),
    )
    gm = canonical(float_module, x=torch.randn(2, 3, 4))
    made(gm, quantize_with(four_bits))
    assert gm(torch.randn(5, 3, 4)).shape == (5, 3, 3)
    assert gm(torch.randn(0, 3, 4)).shape == (0, 3, 3)


def test_quantizers_see_the_padded_input() -> None:
    # The clip has to be that of the values the convolution multiplies.
    conv = nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect")
    float_module, x = nn.Sequential(conv), torch.randn(1, 2, 6)
    gm = canonical(float_module, input=x)
    made(gm, quantize_with(four_bits))
    padded = on_grid(F.pad(x, (2, 2), mode="reflect"), True, None)
    assert torch.equal(gm(x), F.conv1d(padded, on_grid(conv.weight, True, 0), conv.bias))


def test_quantizers_are_the_only_change_to_the_tree() -> None:
    float_module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    keys, children = list(float_module.state_dict()), list(float_module.named_children())
    gm = canonical(float_module, input=torch.randn(1, 2, 5, 5))
    made(gm, quantize_with(four_bits))
    assert list(gm.state_dict()) == keys and list(float_module.named_children()) == children
    assert [name for name, m in gm.named_modules() if isinstance(m, FakeQuantizer)] == [
        "quantizers.0_input",
        "quantizers.0_weight",
    ]
