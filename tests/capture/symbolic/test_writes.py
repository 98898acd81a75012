"""What forward writes: in place, by augmented assignment, into parameters, past autograd, as in Python."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octav_fx.errors import OctavError
from octav_fx.ir.printer import graph_text
from tests.support.alike import quantized_alike
from tests.support.graphs import captured, model

WRITES: dict[str, Callable[..., Any]] = {}


def write(function: Callable[..., Any]) -> Callable[..., Any]:
    WRITES[function.__name__] = function
    return function


@write
def data_times_mask(s: Any, x: Tensor) -> Tensor:
    s.fc.weight.data *= s.mask
    return s.fc(x)


@write
def data_set(s: Any, x: Tensor) -> Tensor:
    s.fc.weight.data = s.fc.weight.data * s.mask
    return s.fc(x)


@write
def data_set_by_another_name(s: Any, x: Tensor) -> Tensor:
    w = s.fc.weight
    w.data = torch.renorm(w.data, 2, 0, 1.0)
    return F.linear(x, w)


@write
def part_of_data(s: Any, x: Tensor) -> Tensor:
    s.fc.weight.data[:, :3] *= 0.5
    s.fc.weight.data[0] = 0
    return s.fc(x)


@write
def data_times_mask_in_place(s: Any, x: Tensor) -> Tensor:
    s.fc.weight.data.mul_(s.mask)
    return s.fc(x)


@write
def parameter_under_no_grad(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        s.fc.weight.mul_(s.mask)
        s.fc.bias[:2] = 0
    return s.fc(x)


@write
def parameter_times_mask_under_no_grad(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        s.fc.weight *= s.mask
    return s.fc(x)


@write
def activation_under_no_grad(s: Any, x: Tensor) -> Tensor:
    y = s.fc(x)
    with torch.no_grad():
        y *= 2
        y.add_(1)
    return y


@write
def buffer_times(s: Any, x: Tensor) -> Tensor:
    s.mask *= 0.9
    return s.fc(x) * s.mask


@write
def part_times(s: Any, x: Tensor) -> Tensor:
    y, z = s.fc(x), torch.sigmoid(x[..., 4:])
    y[..., 4:] *= z
    y[:, 0] -= x[:, 0]
    y[:, 1] **= 2
    y[..., 2] /= 2
    return y


@write
def where_a_mask_says(s: Any, x: Tensor) -> Tensor:
    y = s.fc(x)
    y[x > 0] = 0
    y[:, [0, 2]] += 1
    return y


@write
def two_names(s: Any, x: Tensor) -> Tensor:
    y = s.fc(x)
    z = y
    z *= 2
    z += x
    return y


@write
def view_of(s: Any, x: Tensor) -> Tensor:
    y = s.fc(x)
    first, last = y[..., :4], y.narrow(-1, 4, 4)
    first *= 2
    last -= 1
    return y


@write
def by_reader_and_writer(s: Any, x: Tensor) -> Tensor:
    y = s.fc(x)
    z = y + 1
    y += z
    return y * z


@write
def copy_of_parameter(s: Any, x: Tensor) -> Tensor:
    w = s.fc.weight.clone()
    w[:4] *= 2
    w -= 0.1
    return F.linear(x, w)


@write
def number(s: Any, x: Tensor) -> Tensor:
    n = x.shape[1]
    n *= 2
    n += 1
    return s.fc(x) * n


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_those_of_forward(name: str) -> None:
    float_model = model(WRITES[name], fc=nn.Linear(8, 8), mask=torch.ones(8, 8).tril())
    quantized_alike(float_model, (torch.randn(2, 8, 8),), (torch.randn(3, 8, 8),))


def test_an_augmented_assignment_is_a_write_only_where_memory_is_shared() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = x * 2
        y += 1
        y[0] += 1
        return y

    assert graph_text(captured(model(forward), x=torch.randn(3, 4)).graph).count("iadd(") == 1


@pytest.mark.parametrize("name", ["data", "grad", "requires_grad"])
def test_what_a_graph_cannot_hold_is_refused(name: str) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.fc(x)
        setattr(y, name, x[0])
        return y

    with pytest.raises(OctavError, match=r"test_writes\.py:\d+: forward sets"):
        captured(model(forward, fc=nn.Linear(8, 8)), x=torch.randn(3, 8))
