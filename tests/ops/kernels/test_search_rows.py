import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.formats.granularity import Granularity
from octav_fx.formats.registry import format_of
from octav_fx.formats.scales import SCALES
from octav_fx.formats.spec import Spec, spec_of
from octav_fx.ops.optimal_clip import reference
from tests.support.examples import examples
from tests.support.interpreter import DEVICE
from tests.support.pairwise import pairwise
from tests.support.strategies import FORMS, specs, tensors

kernel = pytest.importorskip("octav_fx.ops.kernels.search_rows.kernel")

pytestmark = pytest.mark.gpu


def solve(x, spec, method):
    out = torch.full(spec_of(spec).granularity.clip_shape(x.shape), math.nan, device=DEVICE)
    assert kernel.search_rows(x, spec_of(spec), method, out=out)
    return out, reference.optimal_clip(x, torch.zeros(()), spec, method)


@pairwise({"n": [1, 16, 24, 32, 64, 128], "form": FORMS, "scale": list(SCALES), "method": ["octav", "max"]})
def test_it_is_the_reference_bit_for_bit(n, form, scale, method):
    x = torch.randn(5, n, device=DEVICE) * torch.randn(5, 1, device=DEVICE).exp()
    out, expected = solve(x, str(Spec(format_of(form), Granularity("token", 1), scale)), method)
    assert torch.equal(out, expected)


@examples(40)
@given(data=st.data())
def test_whatever_the_numbers_and_where_they_lie(data):
    x = data.draw(tensors(kernel.FLOATS)).to(DEVICE)
    spec = data.draw(specs(x, FORMS, list(SCALES)))
    granularity = spec_of(spec).granularity
    if granularity.is_short and x.numel() and granularity.rows(x).shape[-1] <= 48:
        out, expected = solve(x, spec, data.draw(st.sampled_from(["octav", "max"])))
        assert torch.equal(out, expected)


def test_a_step_that_is_stored_as_infinity_is_never_the_best():
    x = torch.full((1, 16), 1.7e38, device=DEVICE)
    x[0, 0] = torch.finfo(torch.float32).max
    out, expected = solve(x, "ternary/token.1/bfloat16", "octav")
    assert torch.equal(out, expected)
    assert (out < 2e38).all()


def test_rows_of_an_odd_number_of_lines_are_near():
    x = torch.randn(8, 80, device=DEVICE)
    out, expected = solve(x, "int4/token.1", "octav")
    # Another order of the sums may find another of two steps whose errors are equal but for their last places.
    step, other = out.double() / 8, expected.double() / 8
    errors = [((x / s).round().clamp(-8, 7) * s - x).square().sum(-1) for s in (step, other)]
    torch.testing.assert_close(*errors, rtol=1e-6, atol=0)


def test_what_it_declines():
    x, out = torch.randn(2, 2 * kernel.LONGEST, device=DEVICE), torch.zeros(2, 1, device=DEVICE)
    assert not kernel.search_rows(x, spec_of("int4/token.1"), "octav", out=out)
    assert not kernel.search_rows(x[:, :32], spec_of("int4/token.1"), "percentile", out=out)
