"""The graph of a report: places, and what is joined."""

import torch
from torch import Tensor, nn

from octav_fx import quantize
from octav_fx.reporting.report.layout import drawn, placed


class Forked(nn.Module):
    """A sum of two ways of unequal length."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) + self.c(x)


def test_depth_is_the_longest_way_and_no_two_nodes_share_a_place():
    q = quantize(Forked(), torch.randn(2, 4))
    found = {node.name: place for node, place in placed(q.graph).items()}
    assert len(set(found.values())) == len(found)
    depths = {name: depth for name, (depth, _) in found.items()}
    assert [depths[name] for name in ("x", "a", "relu", "b", "c", "add", "output")] == [0, 1, 2, 3, 1, 4, 5]


def test_quantizers_and_parameters_are_not_drawn():
    q = quantize(Forked(), torch.randn(2, 4))
    graph = drawn([q], {q: ""})
    assert [node["node"] for node in graph["nodes"]] == ["x", "a", "relu", "b", "c", "add", "output"]
    names = [node["node"] for node in graph["nodes"]]
    assert sorted((names[a], names[b]) for a, b in graph["edges"]) == sorted(
        [("x", "a"), ("a", "relu"), ("relu", "b"), ("x", "c"), ("b", "add"), ("c", "add"), ("add", "output")]
    )


def test_a_second_graph_stands_behind_the_first():
    one, two = quantize(Forked(), torch.randn(2, 4)), quantize(nn.Linear(4, 4), torch.randn(2, 4))
    graph = drawn([one, two], {one: "one", two: "two"})
    last = max(node["x"] for node in graph["nodes"] if node["graph"] == "one")
    assert min(node["x"] for node in graph["nodes"] if node["graph"] == "two") == last + 2
