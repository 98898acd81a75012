import math

import pytest
import torch

from octav_fx.formats.granularity import clip_shape
from octav_fx.formats.spec import integers
from octav_fx.ops.optimal_clip import reference
from tests.support.interpreter import DEVICE

kernel = pytest.importorskip("octav_fx.ops.kernels.solve_rows.kernel")

pytestmark = pytest.mark.gpu
# What kernel and reference may differ by: both end within a few roundings (2**-24 = 6e-8 each) of one fixed point.
CLOSE = {"rtol": 1e-6, "atol": 0}


def solved(x, hint, bits, signed, dim, method, longest=kernel.LONGEST):
    out = torch.full(clip_shape(x, dim), math.nan, device=DEVICE)
    assert kernel.solve_rows(x, hint, bits, signed, dim, method, out=out, longest=longest)
    return out


@pytest.mark.parametrize("longest", [kernel.LONGEST, 32])
@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize(("bits", "signed"), [(2, True), (4, False), (8, True)])
@pytest.mark.parametrize("method", kernel.METHODS)
def test_it_finds_what_the_reference_finds(method, bits, signed, dim, longest):
    x = torch.randn(2, 3, 7, device=DEVICE).to(torch.float32 if bits != 8 else torch.bfloat16)
    x[0, 0, :5] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])
    # A hint far too high for one channel, none for the next, a good one for the others.
    hint = torch.full(clip_shape(x, dim), 1.5, device=DEVICE)
    if dim is not None:
        hint[0], hint[1] = 1e6, 0
    clip = solved(x, hint, bits, signed, dim, method, longest)
    torch.testing.assert_close(clip, reference.optimal_clip(x, hint, integers(bits, signed, dim), method), **CLOSE)


@pytest.mark.parametrize("method", kernel.METHODS)
def test_any_memory_layout_has_the_same_rows(method):
    x = torch.randn(3, 2, 2, 5, device=DEVICE)
    wide = torch.zeros(3, 2, 2, 10, device=DEVICE)
    wide[..., ::2] = x
    hint = torch.zeros(2, device=DEVICE)
    expected = solved(x, hint, 4, True, 1, method)
    for same in (wide[..., ::2], x.movedim(0, -1).contiguous().movedim(-1, 0), x.to(memory_format=torch.channels_last)):
        # Summed in another order.
        torch.testing.assert_close(solved(same, hint, 4, True, 1, method), expected, **CLOSE)


@pytest.mark.parametrize("method", kernel.METHODS)
@pytest.mark.parametrize(("shape", "dim"), [((0,), None), ((0, 3), 1), ((3, 0), 0), ((0, 3), 0), ((2, 0, 4), 2)])
def test_an_empty_row_has_a_clip_of_zero(method, shape, dim):
    x = torch.empty(shape, device=DEVICE)
    hint = torch.ones(clip_shape(x, dim), device=DEVICE)
    assert not solved(x, hint, 4, True, dim, method).any()


@pytest.mark.parametrize("method", kernel.METHODS)
def test_rows_of_nothing_one_value_and_great_or_tiny_values(method):
    rows = [[0.0, -0.0, 0.0], [math.nan, math.inf, 0.0], [0.0, -0.7, 0.0], [0.7, 0.7, -0.7], [3e38, 3e38, 3e38]]
    x = torch.tensor([*rows, [1e-40, 2e-40, 3e-40]], device=DEVICE)
    hint = torch.zeros(6, device=DEVICE)
    clip = solved(x, hint, 4, True, 0, method)
    assert clip[:2].tolist() == [0, 0]
    torch.testing.assert_close(clip, reference.optimal_clip(x, hint, integers(4, True, 0), method), **CLOSE)


def test_what_only_the_reference_does_is_declined():
    x, hint = torch.randn(4, device=DEVICE), torch.tensor(1.0, device=DEVICE)
    out = torch.empty((), device=DEVICE)
    assert not kernel.solve_rows(x.double(), hint, 4, True, None, "octav", out=out)
    assert not kernel.solve_rows(x, hint, 4, True, None, "octav", out=out.double())
    assert not kernel.solve_rows(x, hint, 4, True, None, "other", out=out)
