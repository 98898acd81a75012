import math

import pytest
import torch

from octav_fx.formats.spec import integers
from octav_fx.ops.optimal_clip import reference
from tests.support.interpreter import DEVICE
from tests.support.pairwise import pairwise
from tests.support.samples import fixed_point

kernel = pytest.importorskip("octav_fx.ops.kernels.solve_passes.kernel")

pytestmark = pytest.mark.gpu
# What kernel and reference may differ by: both end within a few roundings (2**-24 = 6e-8 each) of one fixed point.
CLOSE = {"rtol": 1e-6, "atol": 0}
COLD = 0.0


def solved(x, hint, bits, signed, method, block=256):
    out = torch.full((), math.nan, device=DEVICE)
    assert kernel.solve_passes(x, torch.tensor(hint, device=DEVICE), bits, signed, method, out=out, block=block)
    return out


@pairwise(
    {
        "method": kernel.PASSES,
        "dtype": [torch.float32, torch.float16, torch.bfloat16],
        "bits, signed": [(2, True), (4, False), (8, True)],
    }
)
def test_it_finds_what_the_reference_finds(method, dtype, bits, signed):
    # 3 programs in the interpreter, of two tiles and less.
    x = torch.randn(1301, device=DEVICE).to(dtype)
    x[100:105] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])
    expected = reference.optimal_clip(x, torch.tensor(COLD, device=DEVICE), integers(bits, signed, None), method)
    torch.testing.assert_close(solved(x, COLD, bits, signed, method), expected, **CLOSE)
    torch.testing.assert_close(solved(x, expected.item() * 1.05, bits, signed, method), expected, **CLOSE)


@pytest.mark.parametrize("hint", [math.inf, -1.0, math.nan, 1e30, 1e-30, 1e3])
def test_no_hint_leads_astray(hint):
    x = torch.randn(700, device=DEVICE)
    assert solved(x, hint, 4, True, "octav").item() == pytest.approx(fixed_point(x.cpu(), 4, True), rel=1e-6)


@pytest.mark.parametrize("method", kernel.PASSES)
@pytest.mark.parametrize("values", [[], [0.0, -0.0], [math.nan, math.inf], [-0.7], [0.7] * 300, [3e38] * 300, [1e-40]])
def test_tensors_of_nothing_and_of_one_magnitude(method, values):
    x = torch.tensor(values, device=DEVICE)
    expected = reference.optimal_clip(x, torch.tensor(COLD, device=DEVICE), integers(4, True, None), method)
    torch.testing.assert_close(solved(x, COLD, 4, True, method), expected, **CLOSE)


def test_a_tensor_with_gaps_is_read_where_it_lies():
    wide = torch.randn(40, 60, device=DEVICE)
    assert torch.equal(
        solved(wide[:, ::3], COLD, 4, True, "octav"), solved(wide[:, ::3].contiguous(), COLD, 4, True, "octav")
    )


def test_steps_after_the_last_one_read_nothing(monkeypatch):
    # A launch that finds its clip at rest would turn it into NaN if it read these.
    x, seen = torch.randn(700, device=DEVICE), []

    class Recorded:
        def __getitem__(self, grid):
            def launch(x, hint, out, numbers, counters, *args, PASS, **kwargs):
                left = counters[kernel.LEFT.value].item()
                seen.append((PASS, left))
                if PASS == kernel.STEP and not left:
                    x = torch.full_like(x, math.nan)
                launched[grid](x, hint, out, numbers, counters, *args, PASS=PASS, **kwargs)

            return launch

    launched = kernel.solve_pass_kernel
    monkeypatch.setattr(kernel, "solve_pass_kernel", Recorded())
    warm = fixed_point(x.cpu(), 4, True)
    assert solved(x, warm, 4, True, "octav").item() == pytest.approx(warm, rel=1e-6)
    assert sum(left > 0 for which, left in seen if which == kernel.STEP) <= 3


def test_what_only_the_reference_does_is_declined():
    x, hint, out = torch.randn(4, device=DEVICE), torch.tensor(1.0, device=DEVICE), torch.empty((), device=DEVICE)
    assert not kernel.solve_passes(x.double(), hint, 4, True, "octav", out=out)
    assert not kernel.solve_passes(x, hint, 4, True, "octav", out=out.double())
    assert not kernel.solve_passes(x, hint, 4, True, "other", out=out)
