"""text: a graph as lines, the same for equal graphs."""

import torch
from torch import fx, nn
from torch.nn import functional as F

from octav_fx.ir.printer import fingerprint, graph_text
from tests.support.graphs import captured, model, parameter


def test_each_kind_of_node() -> None:
    def forward(self, x, y=None):
        z = self.act(x).flatten(start_dim=1) + self.bias
        return {"z": [F.pad(z, (1, 1), value=0.5), z[:, ::2]], "size": z.shape}

    gm = captured(model(forward, act=nn.ReLU(), bias=parameter(4)), x=torch.randn(2, 2, 2), y=None)
    lines = graph_text(gm.graph).splitlines()
    assert lines == [
        "act = self.act(x)",
        "flatten = act.flatten(start_dim=1)",
        "bias = self.bias",
        "add = add(flatten, bias)",
        "pad = pad(add, (1, 1), mode='constant', value=0.5)",
        "getitem = getitem(add, (slice(None, None, None), slice(None, None, 2)))",
        "getattr_1 = getattr(add, 'shape')",
        "return {'z': [pad, getitem], 'size': getattr_1}",
    ]


def test_equal_captures_have_equal_text() -> None:
    float_module, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)
    assert graph_text(captured(float_module, input=x).graph) == graph_text(captured(float_module, input=x).graph)


def test_a_fingerprint_is_of_the_graph_and_not_of_the_process() -> None:
    def graph(expected: object) -> fx.Graph:
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output(graph.call_function(torch.add, (x, expected)))
        return graph

    assert fingerprint(graph(object())) == fingerprint(graph(object()))
    assert fingerprint(graph(1)) != fingerprint(graph(2))
