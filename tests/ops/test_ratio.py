"""ratio: how many steps a value is, in eager and in generated code; in that of a GPU: tests/backend/test_gpu.py."""

import math

import pytest
import torch

from octav_fx.backend import inductor
from octav_fx.ops.ratio.op import ratio
from tests.support.compare import assert_same_bits


def numbers() -> torch.Tensor:
    return torch.cat([torch.randn(4000), torch.arange(-40, 40) * 0.185, torch.tensor([0.0, -0.0, math.nan])])


@pytest.mark.parametrize("step", [1e-3, 0.37, 2.0])
def test_it_is_the_nearest(step: float) -> None:
    x, step_ = numbers(), torch.tensor(step)
    # Of two float32 numbers the quotient in float64 is never half-way between two of float32: rounded twice is once.
    assert_same_bits(ratio(x, step_), (x.double() / step_.double()).float())


@pytest.mark.compile
def test_inductor_generates_it() -> None:
    x, step = numbers(), torch.tensor(0.37)
    inductor.register()
    assert_same_bits(torch.compile(lambda x, step: ratio(x, step) + 1)(x, step), x / step + 1)


def test_opcheck() -> None:
    torch.library.opcheck(ratio.default, (torch.randn(3, 4), torch.tensor(0.5)))
