"""What a user adds for one model: a rule for a function of their own, a class of modules to leave alone."""

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx import Config, OctavError, Rule, activation, quantize, weight
from octav_fx.capture.whole import WholeModule
from octav_fx.ir.ops import OPS
from tests.support.on_grid import OnGrid

TWO_BITS = Config(weight_bits=2, activation_bits=2, edge_bits=None)


def shifted(x: Tensor, w: Tensor, *, shift: int = 0) -> Tensor:
    """A contraction that no rule of ours knows by this name, and whose own code is not to be looked into."""
    return torch.tensordot(x, w.roll(shift, 0), dims=1)


SHIFTED = Rule("shifted", (activation(0, "x"), weight(1, "w", channel=1)), target=shifted)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.fc = nn.Parameter(torch.randn(8, 16)), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(shifted(w=self.w, x=x, shift=1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


def test_a_rule_for_a_function_quantizes_its_operands():
    model, x = Net(), torch.randn(4, 8)
    q = quantize(model, x, TWO_BITS, rules=[SHIFTED], strict=True)
    assert isinstance(q, WholeModule)
    found = [(r.node, r.op, r.operand, r.bits, r.signed, r.granularity) for r in octav_fx.rows(q) if r.op == "shifted"]
    assert found == [
        ("one.shifted", "shifted", "x", 2, True, "tensor"),
        ("one.shifted", "shifted", "w", 2, True, "channel 1"),
        # What relu gives cannot be negative.
        ("two.shifted", "shifted", "x", 2, False, "tensor"),
        ("two.shifted", "shifted", "w", 2, True, "channel 1"),
    ]
    assert octav_fx.coverage(q) == octav_fx.Coverage(4 * 512, 4 * 512, [])
    with OnGrid(2) as seen:
        q(x)
    assert (seen.checked, seen.off_grid) == (4, [])
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), model(x))


def test_without_the_rule_the_function_is_looked_into():
    rows = octav_fx.rows(quantize(Net(), torch.randn(4, 8), TWO_BITS))
    assert {(r.node, r.op) for r in rows if r.op == "matmul"} == {("matmul", "matmul"), ("matmul:1", "matmul")}


def test_overrides_and_training_reach_an_own_op():
    q = quantize(Net(), torch.randn(4, 8), Config(overrides={"one.shifted": None}), rules=[SHIFTED])
    assert {r.node for r in octav_fx.rows(q) if r.bits is None} == {"one.shifted"}
    q(torch.randn(4, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in q.parameters())


def test_a_rule_for_an_op_of_torch_ops():
    rule = Rule("outer", (activation(0, "self"), activation(1, "vec2")), target=torch.ops.aten.outer.default)

    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.outer.default(x, x.abs())

    q = quantize(Outer(), torch.randn(9), rules=[rule])
    # An outer product adds nothing up and is no multiply-accumulate, but its operands are quantized as asked.
    assert [(r.operand, r.bits, r.signed) for r in octav_fx.rows(q)] == [("self", 4, True), ("vec2", 4, False)]


def test_an_op_of_torch_ops_may_be_called_by_keywords():
    rule = Rule("outer", (activation(0, "self"), activation(1, "vec2")), target=torch.ops.aten.outer.default)

    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.outer.default(vec2=x.abs(), self=x)

    q = quantize(Outer(), torch.randn(9), rules=[rule])
    assert [(r.operand, r.bits, r.signed) for r in octav_fx.rows(q)] == [("self", 4, True), ("vec2", 4, False)]


def test_a_rule_is_a_row_like_those_of_the_library():
    assert isinstance(SHIFTED, type(OPS["linear"])) and type(OPS["linear"]) is Rule


def test_a_leaf_stays_one_float_call():
    model, x = Net(), torch.randn(4, 8)
    q = quantize(model, x, TWO_BITS, leaves=[Block])
    assert octav_fx.coverage(q).skipped == [(name, "no rule for Block", 1024) for name in ("one", "two")]
    assert type(q.one) is Block
    assert torch.equal(q(x), model(x))


def test_a_leaf_in_a_model_in_parts():
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.two.fc(self.one(x if x.sum() < 1e9 else -x).repeat(1, 2))

    q = quantize(Branching(), torch.randn(4, 8), TWO_BITS, leaves=[Block])
    assert ("one", "no rule for Block", 1024) in octav_fx.coverage(q).skipped


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rules": [shifted]}, r"rules: .*shifted.* is no octav_fx\.Rule"),
        ({"rules": [Rule("linear", ())]}, "with a function as its target"),
        ({"leaves": ["Block"]}, "leaves: 'Block' is no class of modules"),
        ({"leaves": [Block()]}, "is no class of modules"),
    ],
)
def test_what_is_neither_is_refused(given, message):
    with pytest.raises(OctavError, match=message):
        quantize(Net(), torch.randn(4, 8), **given)


def test_a_class_of_torch_can_be_a_leaf():
    q = quantize(Net(), torch.randn(4, 8), TWO_BITS, rules=[SHIFTED], leaves=[nn.Linear])
    assert [(node, reason) for node, reason, _ in octav_fx.coverage(q).skipped] == [
        ("one.fc", "one of the leaves"),
        ("two.fc", "one of the leaves"),
    ]


def _hidden(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


def test_a_rule_that_nothing_falls_under_is_an_error():
    rule = Rule("hidden", (activation(0, "x"), weight(1, "w", channel=1)), target=_hidden)
    with pytest.raises(OctavError, match=r"no graph calls .*_hidden.*, whose rule is 'hidden'"):
        quantize(Net(), torch.randn(4, 8), rules=[rule])
