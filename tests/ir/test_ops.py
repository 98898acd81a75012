"""ops: each spelling is one op, and a subclass counts while it computes what its parent computes."""

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from octav_fx.capture.symbolic.proxies import setitem_
from octav_fx.errors import OctavError
from octav_fx.ir.op import Op
from octav_fx.ir.ops import OPS, by_name, in_place, module_of, op_of, op_of_module
from tests.support.graphs import captured, model


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((Op("a", target=torch.abs), Op("a", target=torch.neg)), r"op 'a' has two rows in octav_fx/ir/table"),
        ((Op("a", target=torch.abs), Op("b", target=torch.neg, functions=(torch.abs,))), r"abs.* of 'a' and of 'b'"),
        ((Op("a", target=torch.abs, methods=("abs",)), Op("b", target=F.gelu, methods=("abs",))), r"of 'a' and of 'b'"),
        ((Op("a"),), r"the row of 'a' has no target"),
    ],
)
def test_rows_that_contradict_each_other_are_an_error(rows: tuple[Op, ...], message: str) -> None:
    with pytest.raises(OctavError, match=message):
        by_name(rows)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_a_node_is_known_by_each_spelling_of_its_op(op: Any) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for target in (op.target, *op.functions):
        assert op_of(graph.call_function(target, (x,))) is op
    for name in op.methods:
        assert op_of(graph.call_method(name, (x,))) is op
        # A method of this name has to be one of a tensor, or no graph can hold it.
        assert hasattr(Tensor, name) or name == "__imatmul__"
    for kind in op.modules:
        assert issubclass(kind, nn.Module)


def test_other_nodes_are_no_op() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    others = (x, graph.get_attr("weight"), graph.call_function(F.glu, (x,)), graph.call_method("erf", (x,)))
    assert [op_of(node) for node in (*others, graph.output(x))] == [None] * 5


def test_a_module_is_its_class_and_a_subclass_that_keeps_the_forward() -> None:
    class Same(nn.Conv2d):
        pass

    class Other(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return input

    class Deeper(Other):
        pass

    names = [
        op and op.name for op in map(op_of_module, (nn.Conv2d(1, 1, 1), Same(1, 1, 1), Other(1, 1, 1), Deeper(1, 1, 1)))
    ]
    assert names == ["conv2d", "conv2d", None, None]
    # A subclass of one row that is a row of its own.
    assert [op_of_module(m).name for m in (nn.ReLU6(), nn.Hardtanh(), nn.Dropout2d())] == ["relu6", "clamp", "dropout"]
    assert op_of_module(nn.GLU()) is None
    assert op_of_module(nn.MultiheadAttention(4, 2).out_proj).name == "linear"


def test_op_of_a_module_call_and_the_module_itself() -> None:
    inner = nn.Linear(2, 2)
    gm = captured(model(lambda self, x: self.a.b(x), a=model(lambda self, x: x, b=inner)), x=torch.randn(1, 2))
    (call,) = [node for node in gm.graph.nodes if node.op == "call_module"]
    assert module_of(call) is inner and op_of(call).name == "linear"


IN_PLACE = {
    "method": (lambda x: x.add_(1), True),
    "method with an alias": (lambda x: x[0].fill_(1.0), True),
    "function": (lambda x: torch.relu_(x), True),
    "inplace=True": (lambda x: F.relu(x, inplace=True), True),
    "inplace by position": (lambda x: F.leaky_relu(x, 0.1, True), True),
    "module": (nn.ReLU(inplace=True), True),
    "out of place": (lambda x: x.add(1), False),
    "inplace=False": (lambda x: F.relu(x, inplace=False), False),
    "module, out of place": (nn.ReLU(), False),
    "operator": (lambda x: x + 1, False),
    "dunder": (lambda x: x.__add__(1), False),
    "matmul": (lambda x: x @ x, False),
    "operator named past a keyword": (lambda x: operator.or_(x > 0, operator.and_(x < 1, x > 2)), False),
    "overload": (lambda x: torch.ops.aten.relu_.default(x.clone()), True),
    "overload out of place": (lambda x: torch.ops.aten.relu.default(x), False),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name: str) -> None:
    function, expected = IN_PLACE[name]
    parts = {"act": function} if isinstance(function, nn.Module) else {}
    forward = (lambda self, x: self.act(x)) if parts else (lambda self, x: function(x))
    gm = captured(model(forward, **parts), x=torch.randn(3, 3))
    assert any(in_place(node) for node in gm.graph.nodes) is expected


@pytest.mark.parametrize(
    "target", [operator.iadd, operator.imul, operator.itruediv, operator.isub, operator.ipow, setitem_]
)
def test_augmented_assignment_is_in_place(target: Any) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert in_place(graph.call_function(target, (x, 2)))


def test_out_is_in_place() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    assert in_place(graph.call_function(torch.add, (x, 2), {"out": y}))
