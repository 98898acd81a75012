"""symbolic_names: isinstance, type, callable and len are answered for the value, in whatever file they are asked."""

import builtins
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octav_fx.capture.modules import graphs_of
from octav_fx.capture.symbolic.names import symbolic_names
from tests.support import elsewhere
from tests.support.alike import quantized_alike
from tests.support.graphs import captured, model


class Lifting(elsewhere.Base):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.lift(x)
        return self.fc(first) + second


def made(s: Any, x: Tensor) -> Tensor:
    """Make a class by type, and ask about classes."""
    kind = type("Kind", (), {"scale": 2.0})
    assert isinstance(kind, type) and issubclass(type(kind), type) and isinstance(kind(), kind) and type(s) is not kind
    return s.fc(x) * kind.scale


ASKED: dict[str, Callable[..., Any]] = {
    "isinstance in a helper": lambda s, x: s.fc(elsewhere.pair(x)[0]),
    "type in a helper": lambda s, x: s.fc(x) if elsewhere.kind(x) is Tensor else x,
    "type": lambda s, x: s.fc(x) if type(x) is Tensor else x,
    "type of a size": lambda s, x: s.fc(x) if type(x.shape) is torch.Size and type(x.shape[0]) is int else x,
    "type among others": lambda s, x: s.fc(x) if type(x) in (Tensor, nn.Parameter) else x,
    "type of a parameter": lambda s, x: s.fc(x) if type(s.fc.weight) is nn.Parameter else x,
    "issubclass": lambda s, x: s.fc(x) if issubclass(type(x), Tensor) else x,
    "torch.jit.isinstance": lambda s, x: s.fc(x) if torch.jit.isinstance(x, Tensor) else x,
    "the same in a helper": lambda s, x: s.fc(x) if elsewhere.is_scripted_tensor(x) else x,
    "callable": lambda s, x: x if callable(x) else s.fc(x),
    "callable in a helper": lambda s, x: s.fc(elsewhere.default(None, x)),
    "callable method": lambda s, x: s.fc(x) if callable(x.view) and not callable(x.shape) else x,
    "classes": made,
}


@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked(name: str) -> None:
    float_model = model(ASKED[name], fc=nn.Linear(8, 8))
    quantized_alike(float_model, (torch.randn(2, 5, 8),), (torch.randn(3, 7, 8),))


def matched(s: Any, x: Tensor) -> Tensor:
    """Ask by patterns for classes, for what is in sequences, and for what is in dicts."""
    match x:
        case [*_]:
            return x
        case Tensor():
            pass
        case _:
            return x
    match x.shape, x.size(), {"x": x}, x.chunk(2, -1):
        case (_, int(t), 8) as shape, [_, _, 8], {"x": nn.Parameter() | Tensor() as y}, [left, right] if t > 5:
            return s.fc(torch.cat((right, left), -1)) * t + y * len(shape)
        case _:
            return s.fc(x)


def matched_dict(s: Any, given: dict[str, Tensor]) -> Tensor:
    match given:
        case {"x": Tensor(shape=(_, t, _)) as x, "scale": float(scale), **rest} if t > 5:
            return s.fc(x) * scale * (1 + len(rest))
        case _:
            return s.fc(given["x"])


@pytest.mark.slow
@pytest.mark.parametrize("length", [5, 7])
def test_what_patterns_ask(length: int) -> None:
    given = [(torch.randn(2, t, 8),) for t in (length, 7, 4)]
    quantized_alike(model(matched, fc=nn.Linear(8, 8)), *given)
    more = [({"x": x, "scale": 2.0, "y": x},) for (x,) in given]
    quantized_alike(model(matched_dict, fc=nn.Linear(8, 8)), *more)


def targets(s: Any, x: Tensor) -> Tensor:
    """Compare each row with every other one, as contrastive losses do."""
    scores = s.fc(x) @ x.T
    assert type(len(scores)) is int and len(scores.shape) == 2 and len([x]) == 1
    return scores.reshape(len(x), -1) + torch.arange(len(x)) * math.sqrt(len(x))


@pytest.mark.slow
def test_a_length_is_as_free_as_a_size() -> None:
    q = quantized_alike(model(targets, fc=nn.Linear(8, 8)), (torch.randn(2, 8),), (torch.randn(5, 8),))
    assert len(graphs_of(q).graphs_of(q.training)) == 1  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_loop_over_a_length_holds_for_that_length() -> None:
    def summed(s: Any, x: Tensor) -> Tensor:
        return sum(s.fc(x[i]) for i in range(len(x)))

    q = quantized_alike(model(summed, fc=nn.Linear(8, 8)), (torch.randn(2, 3, 8),), (torch.randn(4, 3, 8),))
    assert len(graphs_of(q).graphs_of(q.training)) == 2  # type: ignore[union-attr]


def test_what_is_asked_in_a_base_class_of_another_file() -> None:
    quantized_alike(Lifting(), (torch.randn(2, 5, 8),), (torch.randn(3, 7, 8),))


def test_the_names_mean_afterwards_what_they_meant() -> None:
    def failing(s: Any, x: Tensor) -> Tensor:
        raise ValueError

    with pytest.raises(Exception, match="ValueError"):
        captured(model(failing), x=torch.randn(2))
    for names in (globals(), vars(elsewhere), vars(nn.functional)):
        assert not {"isinstance", "type", "callable"} & names.keys()
    with symbolic_names(nn.Linear(2, 2)):
        assert vars(elsewhere)["type"] is not builtins.type and "type" not in vars(torch)
