"""arguments: a call's arguments by name, however it is written; and the few ways to change them."""

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from octav_fx.errors import OctavError
from octav_fx.ir.arguments import argument, arguments, called_module, module_input, set_argument
from octav_fx.ir.op import REQUIRED
from octav_fx.ir.printer import graph_text
from tests.support.graphs import captured, model


def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call; a string among its arguments stands for a placeholder of that name."""
    graph = fx.Graph()
    names = dict.fromkeys(value for value in (*args, *kwargs.values()) if isinstance(value, str))
    nodes = {name: graph.placeholder(name) for name in names}
    resolve = lambda value: nodes[value] if isinstance(value, str) else value  # noqa: E731
    create = graph.call_method if isinstance(target, str) else graph.call_function
    return create(target, tuple(map(resolve, args)), {key: resolve(value) for key, value in kwargs.items()})


def named(node: fx.Node) -> dict[str, Any]:
    return {name: value.name if isinstance(value, fx.Node) else value for name, value in arguments(node).items()}


CONV = {"input": "x", "weight": "w", "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (call(F.conv2d, "x", "w"), CONV),
        (call(F.conv2d, "x", weight="w", bias="b", groups=2), {**CONV, "bias": "b", "groups": 2}),
        (call(F.conv2d, "x", "w", "b", 2, padding=3), {**CONV, "bias": "b", "stride": 2, "padding": 3}),
        (call(F.linear, input="x", weight="w"), {"input": "x", "weight": "w", "bias": None}),
        # What the first parameter is called elsewhere, and the second.
        (call(torch.ops.aten.mm.default, self="x", mat2="y"), {"input": "x", "other": "y"}),
        (call("mv", "x", vec="y"), {"input": "x", "other": "y"}),
        (
            call("addmm", "c", mat1="x", mat2="y", beta=2),
            {"input": "c", "mat1": "x", "mat2": "y", "beta": 2, "alpha": 1},
        ),
        (call(F.hardtanh, "x", min_val=0), {"input": "x", "min": 0, "max": None}),
        (call("relu", "x"), {"input": "x"}),
        (call(F.relu, "x", inplace=True), {"input": "x", "inplace": True}),
    ],
    ids=lambda value: value.format_node() if isinstance(value, fx.Node) else "",
)
def test_arguments_have_the_names_of_the_row(node: fx.Node, expected: dict[str, Any]) -> None:
    assert named(node) == expected


def test_attributes_of_a_module_are_arguments_of_its_call() -> None:
    norm = nn.BatchNorm2d(3, eps=0.25, affine=False)
    gm = captured(model(lambda self, x: self.norm(x), norm=norm), x=torch.randn(1, 3, 2, 2))
    x, node, _ = gm.graph.nodes
    given = arguments(node)
    assert (given["input"], given["running_mean"], given["weight"]) == (x, norm.running_mean, None)
    assert (given["eps"], given["training"]) == (0.25, norm.training)


def test_what_no_row_knows_has_no_names() -> None:
    with pytest.raises(OctavError, match=r"glu: no row of octav_fx/ir/table knows .*glu"):
        arguments(call(F.glu, "x"))


def test_an_argument_that_is_not_there_is_a_message() -> None:
    with pytest.raises(
        OctavError, match="conv2d: the row of conv2d in octav_fx/ir/table finds no 'scale' in this call"
    ):
        argument(call(F.conv2d, "x", "w"), "scale")
    # A keyword that the row does not know.
    node = call(F.linear, "x", kernel="w")
    assert arguments(node)["weight"] is REQUIRED
    with pytest.raises(OctavError, match="finds no 'weight'"):
        argument(node, "weight")


@pytest.mark.parametrize(
    ("node", "name", "text"),
    [
        (call(F.conv2d, "x", "w", "b", 2), "bias", "conv2d(x, w, None, 2)"),
        (call(F.conv2d, "x", "w", bias="b", stride=2), "bias", "conv2d(x, w, bias=None, stride=2)"),
        (call(F.conv2d, "x", "w", stride=2), "bias", "conv2d(x, w, None, stride=2)"),
        (call(F.conv2d, "x", "w"), "groups", "conv2d(x, w, groups=None)"),
        (call("mv", "x", vec="y"), "other", "x.mv(vec=None)"),
    ],
    ids=lambda value: value.format_node() if isinstance(value, fx.Node) else value,
)
def test_an_argument_is_replaced_where_it_is_written(node: fx.Node, name: str, text: str) -> None:
    set_argument(node, name, None)
    assert graph_text(node.graph).splitlines()[-1] == f"{node.name} = {text}"
    assert argument(node, name) is None


@pytest.mark.parametrize("by_name", [False, True])
def test_what_a_module_of_one_input_reads(by_name: bool) -> None:
    forward = (lambda self, x: self.act(input=x)) if by_name else (lambda self, x: self.act(x))
    x, node, _ = captured(model(forward, act=nn.ReLU()), x=torch.randn(2)).graph.nodes
    assert module_input(node) is x


def test_the_module_that_an_argument_calls():
    gm = captured(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval(), input=torch.randn(1, 2))
    calls = gm.graph.find_nodes(op="call_module")
    assert [called_module(node) for node in calls] == [gm.get_submodule(str(node.target)) for node in calls] != []
    (x,) = gm.graph.find_nodes(op="placeholder")
    assert [called_module(value) for value in (x, None, 2, [calls[0]])] == [None] * 4
