import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from octav_fx.clips.kmeans import PARTS, _ascending, kmeans
from tests.support.examples import examples
from tests.support.samples import SAMPLES

DATA = ["gaussian", "laplace", "student_t", "half_rectified", "gelu", "softmax"]


def error(x: Tensor, levels: Tensor) -> float:
    return float((x.double().unsqueeze(-1) - levels.double()).square().amin(-1).sum())


def least(x: Tensor, count: int) -> float:
    """The least error of so many levels, by all cuts of the sorted elements."""
    ordered = np.sort(x.double().numpy())
    sums, squares = (np.concatenate([[0], values.cumsum()]) for values in (ordered, ordered**2))
    place = np.arange(len(ordered) + 1)
    many = place[None, :] - place[:, None]
    of_part = squares[None, :] - squares[:, None] - (sums[None, :] - sums[:, None]) ** 2 / np.maximum(many, 1)
    of_part[many < 0] = np.inf
    found = of_part[0]
    for _ in range(count - 1):
        found = (found[:, None] + of_part).min(0)
    return float(found[-1])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", DATA)
def test_the_error_is_the_least_there_is(name, bits):
    for n in (PARTS, 700):
        x = SAMPLES[name](n + 100).flatten()[:n]
        best = least(x, 2**bits)
        # Of few elements every cut is tried: only rounding levels to float32 is left.
        bound = 1.004 * best if n > PARTS else best + 1e-6 * float(x.square().sum())
        assert error(x, kmeans(x, 2**bits)) <= bound, n


@examples(100)
@given(st.lists(st.floats(-4, 4, width=32), min_size=0, max_size=40), st.randoms(use_true_random=False))
def test_levels_ascend_and_know_neither_order_nor_what_is_not_finite(values, random):
    x = torch.tensor(values)
    levels = kmeans(x, 8)
    assert levels.dtype is x.dtype
    assert (levels.diff() >= 0).all()
    if len(set(values)) <= 8:
        # What sums of squares near one lose in float64.
        assert error(x, levels) <= 1e-14
    mixed = [*values, torch.nan, torch.inf, -torch.inf]
    random.shuffle(mixed)
    # Other places are tried where there are more elements; here there are few.
    torch.testing.assert_close(kmeans(torch.tensor(mixed), 8), levels, rtol=0, atol=0)


def test_few_values_among_many_elements_are_levels():
    x = torch.tensor([-2.0, 0, 0.5, 3])[torch.randint(4, (5000,))]
    assert error(x, kmeans(x, 4)) == 0


def test_lloyds_steps_have_moved_the_cuts():
    # Each element is nearest to the mean of its own part, but for what the last step has moved.
    x = torch.randn(20_000)
    levels = kmeans(x, 16)
    part = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
    means = torch.zeros(16).index_add(0, part, x) / part.bincount()
    torch.testing.assert_close(means, levels, rtol=0, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_numbers_are_sorted_by_their_bits(dtype, n):
    x = torch.randn(n, dtype=dtype)
    x[:5] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40])[:n]
    assert torch.equal(_ascending(x), x.sort().values)
