"""One pass over rows, in C++ and in Triton, against the two ops that it is defined as: equal to the bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.formats.granularity import Granularity
from octav_fx.formats.registry import format_of
from octav_fx.formats.scales import SCALES
from octav_fx.formats.spec import Spec, spec_of
from octav_fx.ops.fake_quantize.op import fake_quantize
from octav_fx.ops.optimal_clip.op import optimal_clip
from octav_fx.ops.quantize.op import quantize
from octav_fx.ops.quantize_rows import reference
from octav_fx.ops.quantize_rows.op import is_one_pass, quantize_rows
from tests.support.compare import assert_same_bits
from tests.support.examples import examples
from tests.support.pairwise import pairwise
from tests.support.strategies import DTYPES, FORMS, NATIVE, filled_with_nan, specs, tensors

# One vector and less, groups, and rows too long to lie abreast.
LENGTHS = [1, 15, 16, 32, 48, 128, 1030, 2050]
KINDS = ["codes", torch.float32, torch.bfloat16]


def two_ops(x, spec, method, dtype, ceiling):
    clip = optimal_clip(x, torch.zeros(()), spec, method)
    if dtype.is_floating_point:
        return fake_quantize(x, clip, spec, "ste", dtype), clip
    return quantize(x, clip, spec, ceiling), clip


def assert_one_pass(x, spec, method, kind, ceiling=None):
    dtype = spec_of(spec).format.codes_dtype if kind == "codes" else kind
    expected = two_ops(x, spec, method, dtype, ceiling)
    with filled_with_nan():
        found = quantize_rows(x, spec, method, dtype, ceiling)
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)
        assert one.stride() == other.stride()
    return found


@pairwise(
    {"n": LENGTHS, "form": FORMS, "scale": list(SCALES), "method": ["octav", "max"], "dtype": NATIVE, "kind": KINDS}
)
def test_it_is_the_two_ops(kernels, n, form, scale, method, dtype, kind):
    x = (torch.randn(19, n) * torch.randn(19, 1).exp()).to(dtype)
    assert_one_pass(x, str(Spec(format_of(form), Granularity("token", 1), scale)), method, kind, 0.5)


@examples(200)
@given(data=st.data())
def test_whatever_the_numbers_and_where_they_lie(kernels, data):
    x, method = data.draw(tensors(NATIVE)), data.draw(st.sampled_from(["octav", "mse", "max"]))
    spec, kind = data.draw(specs(x, FORMS, list(SCALES))), data.draw(st.sampled_from(KINDS))
    if is_one_pass(spec_of(spec), method):
        assert_one_pass(x, spec, method, kind, data.draw(st.sampled_from([None, 1.0])))


@examples(60)
@given(data=st.data())
def test_what_has_no_kernel_is_its_reference(data):
    x, method = data.draw(tensors(DTYPES)), data.draw(st.sampled_from(["octav", "octav-grid", "percentile"]))
    spec, kind = data.draw(specs(x, ["int4", "uint3"], ["float32", "e8m0"])), data.draw(st.sampled_from(KINDS))
    dtype = spec_of(spec).format.codes_dtype if kind == "codes" else kind
    if spec_of(spec).granularity.is_short and (x.dtype is torch.float64 or not is_one_pass(spec_of(spec), method)):
        found, expected = quantize_rows(x, spec, method, dtype), reference.quantize_rows(x, spec, method, dtype)
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)


def test_the_result_depends_on_no_number_of_threads(kernels, threads):
    x = torch.randn(1001, 64)
    alone = [quantize_rows(x, f"int4/{shared}.1", "max", torch.int8) for shared in ("token", "group-32")]
    threads(2)
    again = [quantize_rows(x, f"int4/{shared}.1", "max", torch.int8) for shared in ("token", "group-32")]
    for one, other in zip(alone, again, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("method", ["octav", "max"])
def test_no_scale_overflows(kernels, method):
    # A power of two above the largest float32 number of 4 bits.
    x = torch.full((3, 32), 3e38)
    assert_one_pass(x, "int2/token.1/e8m0", method, torch.float32)


@pytest.mark.parametrize("n", [16, 48])
def test_groups_that_do_not_come_out_even_are_refused(n):
    x = torch.randn(2, n)
    for op in (quantize_rows, reference.quantize_rows):
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            op(x, "int4/group-32.1", "max", torch.int8)
