"""Texts of sizes, dtypes and tensors: one that may be a key holds for what it says, one for a reader holds for all."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.capture.modules import graphs_of
from octav_fx.capture.partial import PartialModule, partial_lines
from tests.support.alike import assert_follows

x, longer, one = torch.randn(2, 5, 8), torch.randn(3, 7, 8), torch.randn(1, 1, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.scales = {"5": 2.0, "7": 3.0, "(2, 5, 8)": 5.0, "torch.Size([3, 7, 8])": 7.0, "cpu torch.float32": 11.0}
        self.places = nn.ParameterDict({"of_5": torch.randn(5, 8), "of_7": torch.randn(7, 8)})

    def scale(self, x: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.float())) * self.scale(x)


class OfSize(Net):
    def scale(self, x: Tensor) -> Any:
        return self.scales.get(f"{x.shape[1]}", 1.0) + self.scales.get(str(x.size(1)), 1.0)


class OfPercent(Net):
    def scale(self, x: Tensor) -> Any:
        return self.scales.get("%d" % x.shape[1], 1.0) + self.scales.get("{}".format(x.size(1)), 1.0)  # noqa: UP031, UP032


class OfShape(Net):
    def scale(self, x: Tensor) -> Any:
        return self.scales.get(str(tuple(x.shape)), 1.0) + self.scales.get(repr(x.shape), 1.0)


class OfKind(Net):
    def scale(self, x: Tensor) -> Any:
        return self.scales.get(f"{x.device} {x.dtype}", 1.0)


class OfParameter(Net):
    def scale(self, x: Tensor) -> Any:
        name = f"of_{x.shape[1]}"
        return self.places.get(name, 1.0)


class Untold(Net):
    """Keys where texts for readers stand elsewhere."""

    current = 1.0

    def info(self, name: str) -> None:
        self.current = self.scales.get(name, 1.0)

    def scale(self, x: Tensor) -> Any:
        self.info(f"{x.shape[1]}")
        try:
            raise KeyError(f"{x.shape[1]}")
        except KeyError as error:
            raised = self.scales.get(error.args[0], 1.0)
        return self.current + raised + math.log(self.scales.get(f"{x.shape[1]}", 1.0))


@pytest.mark.parametrize("kind", [OfSize, OfPercent, OfShape, OfKind, OfParameter, Untold])
def test_a_text_that_is_a_key_is_that_of_the_call(kind: type[nn.Module]) -> None:
    q = assert_follows(kind, ((x,), (longer,), (one,), (x.double(),), (x,)), training=False)
    assert partial_lines(q) == []


class Tells(Net):
    def scale(self, x: Tensor) -> Any:
        torch._assert(x.shape[1] > 0, f"a length of {x.shape[1]} in {tuple(x.shape)}")
        print(x.shape, f"mean {x.mean()}")
        if x.shape[1] > 100:
            raise ValueError(f"{x.shape[1]} is too long")
        warnings.warn(f"of {x.dtype}, {x.size(1)} long", stacklevel=2)
        return 1.0


@pytest.mark.filterwarnings("ignore:of torch.float")
def test_a_text_for_a_reader_holds_for_every_size() -> None:
    q = assert_follows(Tells, ((x,), (longer,), (one,)), training=False)
    graphs = graphs_of(q)
    assert graphs is not None and len(graphs.graphs_of(False)) == 1


class OfData(Net):
    def scale(self, x: Tensor) -> Any:
        return self.scales.get(f"{x.max():.0f}", 1.0)


def test_a_text_of_data_is_in_no_graph() -> None:
    q = assert_follows(OfData, ((x,), (5 * x / x.max(),), (longer,)), training=False)
    assert isinstance(q, PartialModule) and octav_fx.coverage(q).share == 1
    assert "test_texts.py" in partial_lines(q)[0] and "depends on the data" in partial_lines(q)[0]


class Asserts(Net):
    def scale(self, x: Tensor) -> Any:
        torch._assert(x.shape[1] < 7, f"at most 6, got {x.shape[1]}")
        return 1.0


def test_an_assertion_that_fails_says_what_the_model_says() -> None:
    q = octav_fx.quantize(Asserts().eval(), x)
    with pytest.raises(AssertionError, match="at most 6, got 7"):
        q(longer)
    assert q(one).shape == one.shape
