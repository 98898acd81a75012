"""view: tensors flow along the edges, sizes do not."""

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from octav_fx.errors import OctavError
from octav_fx.ir.dataflow import (
    constants,
    downstream,
    holds_tensor,
    readers,
    state_only,
    tensor_flow,
    upstream,
    value_of,
    written_before,
)
from tests.support.graphs import captured, model, parameter


def by_name(gm):
    return {node.name: node for node in gm.graph.nodes}


def names(nodes) -> set[str]:
    return {node.name for node in nodes}


def test_a_size_carries_no_tensor() -> None:
    gm = captured(model(lambda self, x, y: x.view(y.shape[0], -1)), x=torch.randn(2, 6), y=torch.randn(3, 1))
    nodes = by_name(gm)
    flow = tensor_flow(gm.graph)
    assert holds_tensor(nodes["x"]) and not holds_tensor(nodes["getitem"])
    assert names(flow.predecessors(nodes["view"])) == {"x"}
    # The size is computed from a tensor, which is an edge; what it is used for is not.
    assert names(downstream(flow, [nodes["y"]])) == {"getattr_1"}


def test_tuples_and_lists_of_tensors_carry_them() -> None:
    gm = captured(model(lambda self, x: torch.cat(x.chunk(2, 1)[::-1])), x=torch.randn(2, 4))
    nodes = by_name(gm)
    assert holds_tensor(nodes["chunk"])
    assert names(downstream(tensor_flow(gm.graph), [nodes["x"]])) == {*nodes} - {"x"}


def test_downstream_and_upstream_leave_out_where_they_start() -> None:
    gm = captured(model(lambda self, x: x.relu().neg().abs()), x=torch.randn(2))
    nodes, flow = by_name(gm), tensor_flow(gm.graph)
    assert names(downstream(flow, [nodes["relu"]])) == {"neg", "abs_1", "output"}
    assert names(upstream(flow, [nodes["neg"]])) == {"x", "relu"}
    # Unless one lies on the path from another.
    assert names(downstream(flow, [nodes["relu"], nodes["neg"]])) == {"neg", "abs_1", "output"}
    assert downstream(flow, []) == set()


def test_static_is_what_depends_on_no_input() -> None:
    def forward(self, x):
        weight = F.normalize(self.a) + self.b
        return x @ weight + (x * 0 + self.b)

    gm = captured(model(forward, a=parameter(3, 3), b=torch.ones(3, 3)), x=torch.randn(3, 3))
    found = names(state_only(tensor_flow(gm.graph)))
    assert found == {"a", "b", "normalize", "add"}


def test_the_graph_of_a_view_has_every_node() -> None:
    gm = captured(model(lambda self, x, y: x), x=torch.randn(2), y=None)
    assert set(tensor_flow(gm.graph)) == set(gm.graph.nodes)


def constant_names(gm) -> set[str]:
    return names(constants(gm.graph))


def test_constants_are_computed_from_state_alone() -> None:
    forward = lambda self, x: x @ (self.w * 2).t() + self.w.expand(x.shape[0], 5, 3).sum()  # noqa: E731
    gm = captured(model(forward, w=parameter(5, 3)), x=torch.randn(3, 3))
    assert constant_names(gm) == {"w", "mul", "t"}
    nodes = by_name(gm)
    assert torch.equal(value_of(gm, nodes["t"]), (gm.w * 2).t())
    with pytest.raises(OctavError, match=r"x .* is not computed from the module's state alone"):
        value_of(gm, nodes["matmul"])


def test_state_that_is_written_is_no_constant() -> None:
    def forward(self, x):
        self.memory[0].mul_(2)
        self.steps.add_(1)
        return x @ self.memory + self.w + self.steps

    gm = captured(model(forward, memory=torch.ones(3, 3), steps=torch.zeros(1), w=parameter(3)), x=torch.randn(2, 3))
    assert {node.target for node in constants(gm.graph)} == {"w"}


def test_what_is_written_into_a_result_leaves_the_weights_alone() -> None:
    forward = lambda self, x: F.relu_(F.linear(x, self.w))  # noqa: E731
    gm = captured(model(forward, w=parameter(3, 3)), x=torch.randn(2, 3))
    assert constant_names(gm) == {"w"}


def test_what_is_drawn_anew_is_no_constant() -> None:
    forward = lambda self, x: x @ F.dropout(self.w, 0.5, True) @ (self.w * torch.rand(3, 3))  # noqa: E731
    gm = captured(model(forward, w=parameter(3, 3)), x=torch.randn(2, 3))
    assert constant_names(gm) == {"w"}


def test_what_reads_sizes_is_no_reader() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for name in ("size", "dim", "numel", "sum"):
        graph.call_method(name, (x,))
    for target, args in ((torch.numel, ()), (getattr, ("shape",)), (getattr, ("T",)), (torch.sin, ())):
        graph.call_function(target, (x, *args))
    assert [reader.name for reader in readers(x)] == ["sum_1", "getattr_2", "sin"]


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda s, x: (y := x + 1, y.mul_(2), y.exp())[-1], True),
        (lambda s, x: (y := x + 1, y[:, :1].zero_(), y.exp())[-1], True),
        (lambda s, x: (y := x + 1, y.relu().mul_(2), y.exp())[-1], False),
        (lambda s, x: (y := x + 1, z := y.exp(), y.mul_(2), z)[-1], False),
    ],
)
def test_what_is_written_into_before_it_is_read(forward, expected) -> None:
    graph = captured(model(forward), x=torch.randn(2, 3)).graph
    (value,) = (node for node in graph.nodes if node.name == "add")
    (reader,) = (node for node in graph.nodes if node.name == "exp")
    assert written_before(value, reader) == expected
    assert not written_before(value, reader, known=list(graph.nodes))
