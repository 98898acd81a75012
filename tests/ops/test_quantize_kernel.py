import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import integers
from octav_fx.ops.quantize import reference
from tests.support.examples import examples
from tests.support.interpreter import DEVICE, poisoned, small_block
from tests.support.strategies import axes, clips, tensors

kernel = pytest.importorskip("octav_fx.ops.quantize.kernel")

pytestmark = pytest.mark.gpu


@examples(80)
@given(data=st.data())
def test_codes_are_those_of_the_reference(data):
    x = data.draw(tensors(kernel.FLOATS)).to(DEVICE)
    dim, bits, signed = data.draw(axes(x)), data.draw(st.integers(2, 8)), data.draw(st.booleans())
    clip, ceiling = data.draw(clips(x, dim)).to(DEVICE), data.draw(st.sampled_from([None, 0.5, 1.0]))
    out = poisoned(x, Grid(bits, signed).codes_dtype)
    assert kernel.quantize(x, clip, integers(bits, signed, dim), ceiling, out=out, block=small_block(x))
    assert torch.equal(out, reference.quantize(x, clip, integers(bits, signed, dim), ceiling))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_each_tie_and_its_neighbours_get_the_code_of_the_reference(bits, signed):
    ties = (torch.arange(-600, 600, device=DEVICE) / 512).repeat(3, 1)
    x = torch.stack([ties[0], ties[1].nextafter(ties[1] + 1), ties[2].nextafter(ties[2] - 1)])
    for clip in (1.0, 0.7):
        out = poisoned(x, Grid(bits, signed).codes_dtype)
        assert kernel.quantize(x, torch.tensor(clip, device=DEVICE), integers(bits, signed, None), out=out)
        assert torch.equal(out, reference.quantize(x, torch.tensor(clip, device=DEVICE), integers(bits, signed, None)))


def test_other_codes_are_declined():
    x, clip = torch.randn(4, device=DEVICE), torch.tensor(1.0, device=DEVICE)
    assert not kernel.quantize(x, clip, integers(4, True, None), out=torch.empty(4, dtype=torch.int32, device=DEVICE))
    assert not kernel.quantize(
        x.double(), clip, integers(4, True, None), out=torch.empty(4, dtype=torch.int8, device=DEVICE)
    )
