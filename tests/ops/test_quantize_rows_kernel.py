"""quantize_rows in Triton, against its definition: equal to the bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.formats.granularity import Granularity
from octav_fx.formats.registry import format_of
from octav_fx.formats.scales import SCALES
from octav_fx.formats.spec import Spec, spec_of
from octav_fx.ops.quantize_rows import reference
from tests.support.compare import assert_same_bits
from tests.support.examples import examples
from tests.support.interpreter import DEVICE, poisoned
from tests.support.pairwise import pairwise
from tests.support.strategies import FORMS, NATIVE, specs, tensors

kernel = pytest.importorskip("octav_fx.ops.quantize_rows.kernel")

pytestmark = pytest.mark.gpu

KINDS = ["codes", torch.float32, torch.bfloat16]


def assert_one_pass(x, spec, method, kind, ceiling=None):
    represented = spec_of(spec)
    dtype = represented.format.codes_dtype if kind == "codes" else kind
    out, clip = poisoned(x, dtype), poisoned(x.new_empty(represented.clip_shape(x.shape), dtype=torch.float32))
    assert kernel.quantize_rows(x, spec, method, dtype, ceiling, out=out, clip=clip)
    levels, clips = reference.quantize_rows(x, spec, method, dtype, ceiling)
    assert_same_bits(out, levels)
    assert_same_bits(clip, clips)


@pairwise({"n": [1, 16, 24, 32, 64], "form": FORMS, "scale": list(SCALES), "method": ["octav", "max"], "kind": KINDS})
def test_it_is_the_reference_bit_for_bit(n, form, scale, method, kind):
    x = torch.randn(5, n, device=DEVICE) * torch.randn(5, 1, device=DEVICE).exp()
    assert_one_pass(x, str(Spec(format_of(form), Granularity("token", 1), scale)), method, kind, 0.5)


@examples(40)
@given(data=st.data())
def test_whatever_the_numbers_and_where_they_lie(data):
    x = data.draw(tensors(NATIVE)).to(DEVICE)
    spec, kind = data.draw(specs(x, FORMS, list(SCALES))), data.draw(st.sampled_from(KINDS))
    granularity = spec_of(spec).granularity
    if granularity.is_short and x.numel() and granularity.rows(x).shape[-1] <= 48:
        assert_one_pass(x, spec, data.draw(st.sampled_from(["octav", "max"])), kind)


def test_rows_that_no_program_holds():
    x = torch.randn(2, 5000, device=DEVICE)
    for kind in KINDS:
        assert_one_pass(x, "int4/token.1", "max", kind)
    x, clip = torch.ones(2, 2**14, device=DEVICE), torch.zeros(2, 1, device=DEVICE)
    assert not kernel.quantize_rows(x, "int4/token.1", "max", torch.int8, out=poisoned(x, torch.int8), clip=clip)
