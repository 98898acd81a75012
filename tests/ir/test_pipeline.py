"""pipeline: passes in order, checked after each; an error says where."""

import functools

import pytest
import torch
from torch import fx

from octav_fx.ir.edits import Edit
from octav_fx.ir.pipeline import name_of, run
from tests.support.graphs import captured, model


def graph() -> fx.GraphModule:
    return captured(model(lambda self, x: x.relu()), x=torch.randn(2))


def to_tanh(gm: fx.GraphModule) -> list[Edit]:
    for node in gm.graph.nodes:
        if node.op == "call_method" and node.target == "relu":
            node.target = "tanh"
            return [Edit("relu", "change", "tanh")]
    return [Edit.unsupported("relu", "there is none")]


def broken(gm: fx.GraphModule) -> list[Edit]:
    gm.graph.get_attr("nothing")
    next(node for node in gm.graph.nodes if node.op == "output").args = (fx.Graph().placeholder("elsewhere"),)
    return []


def failing(gm: fx.GraphModule) -> list[Edit]:
    raise ValueError("no")


def test_edits_are_collected_in_order_and_the_module_runs_the_new_graph() -> None:
    gm, x = graph(), torch.randn(2)
    edits = run(gm, [to_tanh, to_tanh])
    assert [(edit.verb, edit.declined) for edit in edits] == [("change", False), ("skip", True)]
    assert torch.equal(gm(x), x.tanh())


def test_no_passes_no_edits() -> None:
    assert run(graph(), []) == []


def test_an_error_names_its_pass_and_those_before() -> None:
    with pytest.raises(ValueError) as raised:
        run(graph(), [to_tanh, to_tanh, failing])
    assert raised.value.__notes__ == ["in pass failing, after to_tanh, to_tanh"]
    with pytest.raises(ValueError) as raised:
        run(graph(), [functools.partial(failing)])
    assert raised.value.__notes__ == ["in pass failing, after none"]


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_a_graph_that_a_pass_broke_is_found_at_once() -> None:
    with pytest.raises(RuntimeError) as raised:
        run(graph(), [broken, failing])
    assert raised.value.__notes__ == ["in pass broken, after none"]


def test_the_name_of_a_pass_with_options() -> None:
    assert name_of(functools.partial(failing, 1)) == "failing"
    assert name_of(to_tanh) == "to_tanh"
