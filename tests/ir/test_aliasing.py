"""aliasing: a write is seen through every view of the memory, and only between the nodes asked about."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from octav_fx.ir.aliasing import aliasing
from tests.support.graphs import captured, model


def nodes_and_memory(write: Callable[[Tensor], object], **parts: nn.Module) -> tuple[dict[str, fx.Node], object]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = x * 2
        first = y.exp()
        write(y) if not parts else self.act(y)
        second = y.tanh()
        return first, second, y

    gm = captured(model(forward, **parts), x=torch.randn(4, 6))
    return {node.name: node for node in gm.graph.nodes}, aliasing(gm.graph)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda y: y,
    "view": lambda y: y.view(-1),
    "reshape": lambda y: y.reshape(2, -1),
    "index": lambda y: y[1:],
    "transpose": lambda y: y.t(),
    "property": lambda y: y.T,
    "chunk": lambda y: y.chunk(2, 1)[0],
    "unbind": lambda y: torch.unbind(y)[0],
    "unsqueeze": lambda y: y[None, :, None],
    "expand": lambda y: y[0].expand(1, 6),
    "detach": lambda y: y.detach(),
    "contiguous, which it is": lambda y: y.contiguous(),
    "to where it is": lambda y: y.to(torch.float32),
    "dropout off": lambda y: F.dropout(y, training=False),
    "view of view": lambda y: y.view(2, 2, 6)[0].flatten(),
}
COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda y: y.clone(),
    "arithmetic": lambda y: y + 0,
    "contiguous, which it is not": lambda y: y.t().contiguous(),
    "another dtype": lambda y: y.to(torch.float64),
    "list index": lambda y: y[[0, 1]],
    "mask": lambda y: y[torch.tensor([True, False, True, True])],
    "repeat": lambda y: y.repeat(1, 1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_write_through_a_view_is_a_write(name: str) -> None:
    nodes, memory = nodes_and_memory(lambda y: VIEWS[name](y).neg_())
    assert memory.written(nodes["mul"], after=nodes["exp"], before=nodes["tanh"])


@pytest.mark.parametrize("name", COPIES)
def test_a_write_into_a_copy_is_none(name: str) -> None:
    nodes, memory = nodes_and_memory(lambda y: COPIES[name](y).neg_())
    assert not memory.written(nodes["mul"], after=nodes["exp"], before=nodes["tanh"])


def test_only_writes_between_the_two_count() -> None:
    nodes, memory = nodes_and_memory(lambda y: y.neg_())
    value, write = nodes["mul"], nodes["neg_"]
    assert memory.written(value, after=value) and memory.written(value, after=nodes["exp"])
    assert not memory.written(value, after=value, before=nodes["exp"])
    assert not memory.written(value, after=write) and not memory.written(value, after=nodes["tanh"])
    assert not memory.written(value, after=value, before=write)


def test_of_the_input_of_a_copy_nothing_is_written() -> None:
    nodes, memory = nodes_and_memory(lambda y: y.neg_())
    assert not memory.written(nodes["x"], after=nodes["x"])
    assert not memory.written(nodes["exp"], after=nodes["exp"])


def test_a_module_that_writes() -> None:
    nodes, memory = nodes_and_memory(lambda y: None, act=nn.ReLU(inplace=True))
    assert memory.written(nodes["mul"], after=nodes["exp"], before=nodes["tanh"])
    nodes, memory = nodes_and_memory(lambda y: None, act=nn.ReLU())
    assert not memory.written(nodes["mul"], after=nodes["exp"])


def test_views_of_an_input_and_of_a_buffer() -> None:
    def forward(self, x):
        self.buffer.t().add_(1)
        x[0].zero_()
        return x + self.buffer

    gm = captured(model(forward, buffer=torch.zeros(3, 3)), x=torch.randn(3, 3))
    memory = aliasing(gm.graph)
    nodes = {node.name: node for node in gm.graph.nodes}
    assert memory.written(nodes["x"], after=nodes["x"]) and memory.written(nodes["buffer"], after=nodes["buffer"])


def test_a_write_into_one_of_a_tuple_is_a_write_into_the_tuple() -> None:
    def forward(self, x):
        parts = (x * 2).chunk(2)
        parts[0].neg_()
        return parts

    gm = captured(model(forward), x=torch.randn(4))
    nodes = {node.name: node for node in gm.graph.nodes}
    memory = aliasing(gm.graph)
    assert memory.written(nodes["chunk"], after=nodes["chunk"])
    assert memory.is_written_by(nodes["chunk"], nodes["neg_"]) and not memory.is_written_by(nodes["x"], nodes["neg_"])
