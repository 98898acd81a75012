"""record: one row per operand, and one per node that multiplies in float."""

import torch
from torch import nn

from octav_fx.ir.edits import Edit
from octav_fx.ir.records import Record, records
from octav_fx.nn import Settings
from octav_fx.passes import Place, canonicalize, deduplicate_quantizers, quantize_operands
from tests.support.graphs import captured, model, parameter
from tests.support.settings import settings_of


def choose(place: Place) -> Settings | str:
    return "as asked" if place.site.startswith("float") else settings_of(4, place.signed, place.dim, "octav", "pwl")


def rows(float_module: nn.Module, **arguments: torch.Tensor) -> list[Record]:
    gm = captured(float_module, **arguments)
    edits: list[Edit] = [*canonicalize(gm), *quantize_operands(gm, choose), *deduplicate_quantizers(gm)]
    return records(gm.graph, edits)


def test_operands_in_the_order_of_the_graph() -> None:
    float_module = model(
        lambda self, x: self.fc(self.conv(x).flatten(1)) @ self.w,
        conv=nn.Conv2d(1, 2, 3),
        fc=nn.Linear(8, 4),
        w=parameter(4, 3),
    )
    assert rows(float_module, x=torch.randn(5, 1, 4, 4)) == [
        Record("conv", "conv2d", "input", (5, 1, 4, 4), 5 * 4 * 2 * 9, "quantizers.conv_input"),
        Record("conv", "conv2d", "weight", (2, 1, 3, 3), 5 * 4 * 2 * 9, "quantizers.conv_weight"),
        Record("fc", "linear", "input", (5, 8), 5 * 8 * 4, "quantizers.fc_input"),
        Record("fc", "linear", "weight", (4, 8), 5 * 8 * 4, "quantizers.fc_weight"),
        Record("matmul", "matmul", "input", (5, 4), 5 * 4 * 3, "quantizers.matmul_input"),
        Record("matmul", "matmul", "other", (4, 3), 5 * 4 * 3, "quantizers.matmul_other"),
    ]


def test_operands_that_share_a_quantizer_have_a_row_each() -> None:
    assert rows(model(lambda self, x: x @ x), x=torch.randn(3, 3)) == [
        Record("matmul", "matmul", "input", (3, 3), 27, "quantizers.matmul_input"),
        Record("matmul", "matmul", "other", (3, 3), 27, "quantizers.matmul_input"),
    ]


def test_what_was_declined_has_its_reason() -> None:
    float_module = model(lambda self, x: self.float_fc(x), float_fc=nn.Linear(4, 2))
    assert rows(float_module, x=torch.randn(3, 4)) == [
        Record("float_fc", "linear", "input", (3, 4), 24, None, "as asked"),
        Record("float_fc", "linear", "weight", (2, 4), 24, None, "as asked"),
    ]


def test_a_node_that_canonicalize_left_is_one_row() -> None:
    float_module = model(lambda self, x: torch.mm(x, self.w, out=x.new_empty(3, 2)), w=parameter(4, 2))
    assert rows(float_module, x=torch.randn(3, 4)) == [
        Record("matmul", "matmul", None, (3, 2), 24, None, "writes into out=")
    ]


def test_a_node_without_a_rule_is_one_row_if_it_multiplies() -> None:
    float_module = model(lambda self, x: torch.cdist(x, x).softmax(-1).cumsum(0))
    assert rows(float_module, x=torch.randn(3, 4)) == [
        Record("cdist", "cdist", None, (3, 3), 36, None, "no rule for cdist")
    ]


def test_einsum_numbers_its_operands() -> None:
    found = rows(
        model(lambda self, x: torch.einsum("ij,jk,kl->il", x, self.a, self.b), a=parameter(4, 5), b=parameter(5, 2)),
        x=torch.randn(3, 4),
    )
    assert [(r.operand, r.shape, r.quantizer) for r in found] == [
        (f"operand{i}", shape, f"quantizers.einsum_operand{i}") for i, shape in enumerate([(3, 4), (4, 5), (5, 2)])
    ]


def test_a_module_called_twice_has_rows_for_each_call() -> None:
    found = rows(model(lambda self, x: self.fc(self.fc(x)), fc=nn.Linear(4, 4)), x=torch.randn(3, 4))
    assert [(r.site, r.operand) for r in found] == [(s, o) for s in ("fc", "fc:1") for o in ("input", "weight")]
    assert len({r.quantizer for r in found}) == 3
