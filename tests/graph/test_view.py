"""view: tensors flow along the edges, sizes do not."""

import torch
from torch.nn import functional as F

from octav_fx.graph.view import downstream, holds_tensor, static, tensor_flow, upstream
from tests.graph.support import captured, model, parameter


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
    found = names(static(tensor_flow(gm.graph)))
    assert found == {"a", "b", "normalize", "add"}


def test_the_graph_of_a_view_has_every_node() -> None:
    gm = captured(model(lambda self, x, y: x), x=torch.randn(2), y=None)
    assert set(tensor_flow(gm.graph)) == set(gm.graph.nodes)
