"""divide: the quotient nearest to the exact one, in eager and in the code that Inductor generates."""

import math

import pytest
import torch

from octav_fx.backend import inductor
from octav_fx.ops.divide.op import divide
from tests.support.compare import assert_same_bits


def numbers() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(4000, generator=generator), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])])
    return x, torch.rand(len(x), generator=generator) + 1e-3


def test_it_is_the_nearest() -> None:
    x, y = numbers()
    # Of two float32 numbers the quotient in float64 is never half-way between two of float32: rounded twice is once.
    assert_same_bits(divide(x, y), (x.double() / y.double()).float())


@pytest.mark.compile
def test_inductor_generates_it_and_broadcasts() -> None:
    x, y = numbers()
    inductor.register()
    compiled = torch.compile(lambda x, y: divide(x, y) + 1)
    assert_same_bits(compiled(x, y), x / y + 1)
    assert_same_bits(compiled(x, y[7]), x / y[7] + 1)


def test_opcheck() -> None:
    torch.library.opcheck(divide.default, (torch.randn(3, 4), torch.rand(4) + 1))
