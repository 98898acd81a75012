"""The search for the clips of rows, in C++, against its definition: equal to the bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.formats.granularity import Granularity
from octav_fx.formats.registry import format_of
from octav_fx.formats.scales import SCALES
from octav_fx.formats.spec import Spec, spec_of
from octav_fx.ops.optimal_clip import reference
from octav_fx.ops.optimal_clip.op import optimal_clip
from tests.support.examples import examples
from tests.support.pairwise import pairwise
from tests.support.strategies import FORMS, NATIVE, filled_with_nan, specs, tensors

# One vector and less, whole lines of sixteen columns and others, an odd number of lines, rows too long to lie abreast.
LENGTHS = [1, 15, 16, 32, 48, 64, 96, 100, 128, 384, 511, 512, 768, 1030, 2048, 2050]


def solve(x, spec, method):
    shared = spec_of(spec).granularity
    hint = torch.zeros(() if shared.is_short else shared.clip_shape(x.shape))
    with filled_with_nan():
        return optimal_clip(x, hint, spec, method), reference.optimal_clip(x, hint, spec, method)


@pairwise({"n": LENGTHS, "form": FORMS, "scale": list(SCALES), "dtype": NATIVE, "rows": [1, 16, 37]})
def test_the_kernel_finds_what_the_reference_finds(kernels, n, form, scale, dtype, rows):
    x = (torch.randn(rows, n) * torch.randn(rows, 1).exp()).to(dtype)
    found, expected = solve(x, str(Spec(format_of(form), Granularity("token", 1), scale)), "octav")
    assert found.isfinite().all()
    assert torch.equal(found, expected)


@examples(300)
@given(data=st.data())
def test_whatever_the_numbers_and_where_they_lie(kernels, data):
    x = data.draw(tensors(NATIVE))
    spec = data.draw(specs(x, FORMS, list(SCALES)))
    # An integer grid with one clip is solved by Newton's steps, whose sums have another order.
    method = "max" if spec_of(spec).even else data.draw(st.sampled_from(["octav", "mse", "max", "percentile"]))
    found, expected = solve(x, spec, method)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("form", ["pow2", "apot", "nupes", "nf4", "e2m1"])
def test_values_at_the_edges_between_levels(kernels, form):
    levels = format_of(form)
    edges = levels.edges(torch.float32)
    there = torch.cat([edges, edges.nextafter(torch.tensor(9.0)), edges.nextafter(torch.tensor(-9.0)), -edges])
    # Powers of two times that, so that with scales which are such every value is one at some step.
    x = (levels.greatest * torch.rand(64, 32) * 1e-3).copysign(torch.randn(64, 32))
    x[:, :30] = there[torch.randint(len(there), (64, 30))] * 2.0 ** torch.randint(-3, 4, (64, 1))
    for scale in ("e8m0", "float32"):
        found, expected = solve(x, f"{form}/token.1/{scale}", "octav")
        assert torch.equal(found, expected)


@pytest.mark.parametrize("factor", [1e-34, 1e-30, 1e30, 3e37])
@pytest.mark.parametrize("scale", ["float32", "e8m0", "bfloat16"])
@pytest.mark.parametrize("form", ["int4", "e2m1", "e5m2"])
def test_no_square_over_or_underflows(kernels, form, scale, factor):
    x = torch.randn(40, 32) * factor
    found, expected = solve(x, f"{form}/group-16.1/{scale}", "octav")
    assert torch.equal(found, expected)
    assert (found > 0).all()


def test_a_step_that_is_stored_as_infinity_is_never_the_best(kernels):
    # The largest magnitude would be rounded up to infinity.
    x = torch.full((1, 16), 1.7e38)
    x[0, 0] = torch.finfo(torch.float32).max
    found, expected = solve(x, "ternary/token.1/bfloat16", "octav")
    assert torch.equal(found, expected)
    assert (found < 2e38).all()


def test_the_result_depends_on_no_number_of_threads(kernels, threads):
    x = torch.randn(1001, 48)
    alone = solve(x, "int4/token.1", "octav")[0]
    threads(2)
    assert torch.equal(solve(x, "int4/token.1", "octav")[0], alone)


@pytest.mark.parametrize("method", ["octav-grid", "octav-tight"])
def test_other_methods_take_rows_too(kernels, method):
    found, expected = solve(torch.randn(30, 64), "int4/group-32.1", method)
    # As in test_optimal_clip.py: a few roundings from one fixed point.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
