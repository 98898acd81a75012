import math

import pytest
import torch

from octav_fx.clips.methods import METHODS
from octav_fx.formats.grid import Grid

ONE_IN = {"percentile-99.9": 1000, "percentile-99.99": 10_000, "percentile-99.999": 100_000}


def solve(rows, method, signed=True):
    return METHODS[method].solve(rows, torch.zeros(len(rows)), Grid(4, signed))


@pytest.mark.parametrize(("method", "one_in"), ONE_IN.items())
@pytest.mark.parametrize("n", [1, 5, 999, 1000, 1001, 99_999, 250_000])
def test_so_many_values_lie_beyond(method, one_in, n):
    # The magnitudes are 1 .. n in any order.
    x = torch.randperm(n).add(1) * torch.randn(n).sign()
    clip = solve(x.unsqueeze(0), method).item()
    assert clip == n - n // one_in
    assert (x.abs() > clip).sum() == n // one_in


def test_the_short_name_is_the_first():
    x = torch.randn(3, 5000)
    assert torch.equal(solve(x, "percentile"), solve(x, "percentile-99.9"))
    assert not torch.equal(solve(x, "percentile"), solve(x, "max"))


@pytest.mark.parametrize("name", ONE_IN)
def test_quantile_of_numpys_definition(name):
    x = torch.randn(2, 300_000)
    percent = float(name.removeprefix("percentile-")) / 100
    # The least value that such a share of all does not exceed.
    expected = [sorted(row)[math.ceil(round(percent * len(row), 6)) - 1] for row in x.abs().tolist()]
    assert solve(x, name).tolist() == expected


def test_an_unsigned_grid_clips_what_is_positive():
    x = torch.cat([torch.arange(1, 1501.0), -10.0 * torch.arange(1, 501)]).unsqueeze(0)
    assert solve(x, "percentile", signed=False).item() == 1498
    assert solve(x, "percentile").item() == 4980


def test_what_is_not_finite_does_not_count_and_zeros_do():
    x = torch.arange(1, 1001.0)
    bad = torch.tensor([math.inf, -math.inf, math.nan]).repeat(1000)
    assert solve(torch.cat([x, bad]).unsqueeze(0), "percentile").item() == 999
    assert solve(torch.cat([x, torch.zeros(1000)]).unsqueeze(0), "percentile").item() == 998


def test_rows_of_almost_nothing_but_zeros_keep_what_there_is():
    x = torch.zeros(1, 5000)
    x[0, 7] = -3
    assert solve(x, "percentile").item() == 3
