"""Sizes, shapes and kinds that are looked up in dicts and sets, or are keys: what is found is that of the call."""

import collections
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.capture.modules import graphs_of
from octav_fx.capture.partial import partial_lines
from tests.support.alike import assert_close, assert_follows, silent_quantizers

x, longer, one = torch.randn(2, 5, 8), torch.randn(3, 7, 8), torch.randn(1, 1, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.tables = nn.Linear(8, 8), nn.Linear(8, 8), dict[Any, Tensor]()
        # None of the example.
        self.scales: dict[Any, float] = {7: 3.0, (3, 7, 8): 5.0, torch.float64: 7.0}

    def scale(self, x: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x.float())) * self.scale(x)


class Got(Net):
    def scale(self, x: Tensor) -> Any:
        return self.scales.get(x.shape[1], 1.0) * self.scales.get(tuple(x.shape), 1.0)


class InSet(Net):
    def scale(self, x: Tensor) -> Any:
        return (2 if x.size(1) in {7, 9} else 1) * (3 if x.dtype in {torch.float64} else 1) * len({*x.shape, 8, 2})


class InDict(Net):
    def scale(self, x: Tensor) -> Any:
        counts = collections.Counter(x.shape)
        return (2 if x.shape in self.scales else 1) * self.scales.get(x.dtype, 1.0) * (counts[7] + len(counts))


class Filled(Net):
    """A table of its own for each length and kind, which stays."""

    def scale(self, x: Tensor) -> Any:
        key = x.shape[1], x.device, x.dtype
        if key not in self.tables:
            self.tables[key] = torch.arange(x.shape[1]).unsqueeze(1) / x.shape[1]
        return self.tables[key]


class ByDevice(Net):
    """Biases by device, made once in eval mode, as LeViT has them."""

    key_of: Any = str

    def __init__(self) -> None:
        super().__init__()
        self.biases = nn.Parameter(torch.randn(3, 8))
        self.register_buffer("index", torch.tensor([1]))

    def train(self, mode: bool = True) -> Any:
        self.tables = {}
        return super().train(mode)

    def scale(self, x: Tensor) -> Any:
        key = type(self).key_of(x.device)
        if key not in self.tables:
            self.tables[key] = self.biases[self.index]
        return self.tables[key]


class ByDeviceItself(ByDevice):
    key_of = staticmethod(lambda device: device)


@pytest.mark.parametrize("kind", [ByDevice, ByDeviceItself])
def test_a_table_by_device_that_is_there_already_is_computed_in_each_call(kind: type[nn.Module]) -> None:
    model: Any = kind().eval()
    with torch.no_grad():
        model(x)
        q: Any = octav_fx.quantize(model, x)
        assert len(graphs_of(q).graphs_of(False)) == 1  # type: ignore[union-attr]
        for each in (model, q):
            each.train()
            each.biases.data.mul_(2)
            each.eval()
        with silent_quantizers():
            assert_close("after a step", q(longer), model(longer))
        assert len(graphs_of(q).graphs_of(False)) == 1  # type: ignore[union-attr]


class Returned(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x.float())
        return {x.shape[1]: y, ("next", x.shape[0]): self.b(y)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Got, InSet, InDict, Filled, Returned])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_found_is_that_of_the_call(kind: type[nn.Module], training: bool) -> None:
    q = assert_follows(kind, ((x,), (longer,), (one,), (x.double(),), (x,)), training)
    assert partial_lines(q) == []


@functools.cache
def places(length: int) -> Tensor:
    return torch.arange(length).unsqueeze(1) / 8


class Remembered(Net):
    @functools.lru_cache(8)  # noqa: B019
    def more(self, length: int) -> Tensor:
        return torch.arange(length).unsqueeze(1) / 4

    def scale(self, x: Tensor) -> Any:
        return places(x.shape[1]) + self.more(x.size(1))


def test_a_function_that_remembers_takes_every_size() -> None:
    q = assert_follows(Remembered, ((x,), (longer,), (one,)), training=False)
    graphs = graphs_of(q)
    assert graphs is not None and len(graphs.graphs_of(False)) == 1
