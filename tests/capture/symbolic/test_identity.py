"""`a is b` of results: where a graph could not know, the module asks in its own Python."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octav_fx.capture.symbolic.identity import _line_that_compares, may_be_its_input
from octav_fx.capture.whole import WholeModule
from tests.support.alike import assert_follows

x = torch.randn(2, 5, 8)
turned = torch.randn(5, 2, 8).transpose(0, 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop, self.p = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.5), 0.0

    def chosen(self, y: Tensor, is_first: bool) -> Tensor:
        return self.a(y) if is_first else self.b(y)


class Contiguous(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = x.contiguous()
        return self.chosen(y, y is x)


class Dropped(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.a(x), 1e-30, self.training)
        dropped = self.drop(y) if self.p else y
        return self.chosen(y, dropped is y)


def made_again(x: Tensor) -> Tensor:
    return x.contiguous()


class ByFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = made_again(x)
        return self.chosen(y, x is not y)


@pytest.mark.parametrize("kind", [Contiguous, ByFunction, Dropped])
@pytest.mark.parametrize("steps", [((x,), (turned,), (x,)), ((turned,), (x,), (turned,))])
def test_what_may_be_one_tensor_later_is_asked_in_each_call(kind: type[Net], steps: tuple[tuple[Tensor], ...]) -> None:
    assert not isinstance(assert_follows(kind, steps, training=False), WholeModule)


def test_arguments_are_compared_in_a_graph() -> None:
    class Attends(Net):
        def forward(self, x: Tensor, key: Tensor) -> Tensor:
            return self.chosen(x.contiguous(), x is key)

    steps = ((x, x), (x, turned), (turned, turned))
    assert isinstance(assert_follows(Attends, steps, training=False), WholeModule)


def test_what_a_function_returns_as_it_was_is_the_same_in_a_graph() -> None:
    def halved(y: Tensor, p: float) -> Tensor:
        return y / 2 if p else y

    class Halved(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = halved(x, self.p)
            return self.chosen(y, y is x)

    def halve(module: nn.Module) -> None:
        module.p = 1.0

    assert isinstance(assert_follows(Halved, ((x,), (turned,), halve, (x,)), training=False), WholeModule)


def test_only_results_are_compared() -> None:
    sentinel = object()

    def compares(a: object, b: object) -> bool:
        c = a
        return c is b

    def does_not(self: Net, a: object, b: object = None) -> bool:
        return a is b or a is None or a is sentinel or a is Tensor or self.a is self.b

    assert _line_that_compares(compares.__code__) == compares.__code__.co_firstlineno + 2
    assert _line_that_compares(does_not.__code__) is None
    assert may_be_its_input("contiguous") and may_be_its_input(F.dropout) and may_be_its_input(nn.Dropout())
    assert not may_be_its_input("mul") and not may_be_its_input(F.relu) and not may_be_its_input(nn.Linear(1, 1))
