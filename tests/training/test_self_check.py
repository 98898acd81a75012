"""What quantize makes sure of by itself: calls of another size, and one after another."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from math import nan
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.capture.inputs import Inputs
from octav_fx.capture.rerun import without_quantizers
from octav_fx.errors import NotCaptured
from octav_fx.training import check as check_on_data
from octav_fx.training import self_check
from octav_fx.training.self_check import check_in_turn
from tests.support.graphs import model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.norm(self.first(x)).relu())


_RUNS: list[int] = []


@torch.library.custom_op("octav_tests::counted", mutates_args=())
def _counted(x: Tensor) -> Tensor:
    _RUNS.append(len(x))
    return x.clone()


# Of fake tensors there is no run.
_counted.register_fake(torch.empty_like)
_counted.register_autograd(lambda ctx, gradient: gradient)


class Counted(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(_counted(x))


@pytest.mark.parametrize("training", [False, True])
def test_it_takes_no_more_than_ten_forwards(training: bool) -> None:
    _RUNS.clear()
    octav_fx.quantize(Counted().train(training), torch.randn(4, 8))
    assert 0 < len(_RUNS) <= 10


_MEMORY: list[float] = [1.0]


@torch.library.custom_op("octav_tests::but_last", mutates_args=())
def _but_last(x: Tensor) -> Tensor:
    """Copy all rows but the last, which holds what memory held."""
    copied = torch.empty_like(x)
    copied[:-1] = x[:-1]
    if not torch.are_deterministic_algorithms_enabled():
        copied[-1] = _MEMORY[0]
    return copied


_but_last.register_fake(torch.empty_like)


@pytest.mark.parametrize("at_work", [self_check, check_on_data], ids=["by itself", "on data"])
def test_rows_that_nothing_writes_are_no_difference(at_work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def silent_with_other_memory(module: nn.Module) -> Iterator[None]:
        with without_quantizers(module), monkeypatch.context() as within:
            within.setattr(sys.modules[__name__], "_MEMORY", [nan])
            yield

    def forward(self: Any, x: Tensor) -> Any:
        return _but_last(self.second(self.first(x)))

    monkeypatch.setattr(at_work, "without_quantizers", silent_with_other_memory)
    with torch.no_grad():
        q = octav_fx.quantize(model(forward, first=nn.Linear(8, 8), second=nn.Linear(8, 8)), torch.randn(4, 8))
        octav_fx.check(q, [torch.randn(4, 8)])
    assert "in parts" not in octav_fx.table(q)


def test_what_a_second_call_changes_is_not_one_graph() -> None:
    seen: list[int] = []

    def forward(self: Any, x: Tensor) -> Any:
        seen.append(1)
        return self.second(self.first(x)) * len(seen)

    q = octav_fx.quantize(model(forward, first=nn.Linear(8, 8), second=nn.Linear(8, 8)), torch.randn(4, 8))
    assert "in parts, because" in octav_fx.table(q)
    assert octav_fx.coverage(q).share == 1


def test_another_size_is_run_and_the_first_layer_that_differs_named() -> None:
    q = octav_fx.quantize(Net().eval(), torch.randn(4, 8))
    relu = next(node for node in q.graph.nodes if "relu" in node.name)
    # The same for the example alone.
    relu.target, relu.args = _relu_of_four, tuple(relu.args)
    relu.op = "call_function"
    q.recompile()
    with pytest.raises(NotCaptured, match=r"in a call after another one .* differs is second"):
        check_in_turn(q, Inputs((torch.randn(4, 8),)), is_folded=False)


def test_folded_batch_norms_in_training_mode_are_what_was_asked_for() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.norm(self.first(x))
        return (self.second(y), y) if self.training else self.second(y)

    layers = {"first": nn.Linear(8, 8), "norm": nn.BatchNorm1d(8), "second": nn.Linear(8, 8)}
    q = octav_fx.quantize(model(forward, **layers).eval(), torch.randn(4, 8), octav_fx.Config(fold_batchnorm=True))
    assert "in parts" not in octav_fx.table(q)
    assert len(q.train()(torch.randn(4, 8))) == 2


def _relu_of_four(x: Tensor) -> Tensor:
    return x.relu() if len(x) == 4 else x


def test_a_size_that_the_model_does_not_take_is_not_logged() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        # As many places as positions, of which Python asks what it has computed.
        y = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.out(y) if len(y.flatten(0, 1)) > 4 else y

    layers = {"patches": nn.Conv2d(3, 8, 4, 4), "out": nn.Linear(8, 8), "places": nn.Parameter(torch.randn(64, 8))}
    logged: list[logging.LogRecord] = []
    handler, log = logging.Handler(), logging.getLogger("torch._subclasses.fake_tensor")
    handler.emit = logged.append  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        octav_fx.quantize(model(forward, **layers).eval(), torch.randn(2, 3, 32, 32))
    finally:
        log.removeHandler(handler)
    assert logged == []
