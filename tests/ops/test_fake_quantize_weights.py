import math

import pytest
import torch

from octav_fx.formats.spec import integers
from octav_fx.ops.fake_quantize.reference import fake_quantize
from octav_fx.ops.fake_quantize_weights import reference
from octav_fx.ops.fake_quantize_weights.op import fake_quantize_weights
from tests.support.compare import assert_same_bits
from tests.support.interpreter import DEVICE, poisoned

kernel = pytest.importorskip("octav_fx.ops.fake_quantize_weights.kernel")

pytestmark = pytest.mark.gpu
# See test_solve_rows.py.
CLOSE = {"rtol": 1e-6, "atol": 0}
SHAPES = [(3, 2, 3, 3), (2, 40), (1, 7), (4, 1), (2, 16)]


def some_weights(dtype=torch.float32):
    weights = [torch.randn(shape, device=DEVICE).to(dtype) for shape in SHAPES]
    weights[0] = weights[0].to(memory_format=torch.channels_last)
    weights[1][0, :3] = torch.tensor([math.inf, math.nan, -0.0])
    hints = [torch.full((len(w),), hint, device=DEVICE) for w, hint in zip(weights, (0, 2, 1e6, 0, 1.5), strict=True)]
    return weights, hints


def launched(weights, hints, specs, method, at_once=kernel.AT_ONCE):
    out = [poisoned(w) for w in weights]
    clips = torch.full((sum(map(len, hints)),), math.nan, device=DEVICE)
    # Rows of up to 8 and up to 32 elements are held, the others read again.
    classes = ((8, 1), (32, 1))
    left = kernel.fake_quantize_weights(
        weights, hints, specs, method, out=out, clips=clips, classes=classes, at_once=at_once
    )
    return left, out, clips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["octav", "octav-tight", "octav-grid", "max"])
def test_every_row_of_every_weight(method, dtype):
    weights, hints = some_weights(dtype)
    specs = [integers(bits, True, 0) for bits in (8, 4, 4, 4, 3)]
    left, out, clips = launched(weights, hints, specs, method)
    assert left == []
    torch.testing.assert_close(clips, reference.fake_quantize_weights(weights, hints, specs, method)[1], **CLOSE)
    for w, spec, y, clip in zip(weights, specs, out, clips.split([len(w) for w in weights]), strict=True):
        assert_same_bits(y, fake_quantize(w, clip, spec, "ste"))


def test_rows_of_one_class_bit_width_and_dtype_share_a_launch(monkeypatch):
    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return original[grid]

    original = kernel.fake_quantize_weights_kernel
    monkeypatch.setattr(kernel, "fake_quantize_weights_kernel", Recorded())
    weights, hints = some_weights()
    assert launched(weights, hints, [integers(4, True, 0)] * 5, "max")[0] == []
    assert launched(weights, hints, [integers(8, True, 0), *[integers(4, True, 0)] * 4], "max")[0] == []
    # Rows of 18 and 16, of 40, of 7 and 1.
    assert grids == [(5,), (2,), (5,), (3,), (2,), (5,), (2,)]


def test_more_weights_than_a_launch_takes():
    weights = [torch.randn(1 + i % 3, 5, device=DEVICE) for i in range(7)]
    hints, specs = [torch.zeros(len(w), device=DEVICE) for w in weights], [integers(4, True, 0)] * 7
    left, out, clips = launched(weights, hints, specs, "octav", at_once=3)
    assert left == []
    expected, expected_clips = reference.fake_quantize_weights(weights, hints, specs, "octav")
    torch.testing.assert_close(clips, expected_clips, **CLOSE)
    for y, of in zip(out, expected, strict=True):
        torch.testing.assert_close(y, of, rtol=1e-6, atol=0)


def test_what_is_left_for_the_ops_leaves_the_others_alone():
    weights, hints = some_weights()
    gaps = torch.randn(3, 8, device=DEVICE)[:, ::2]
    middle = torch.randn(2, 3, 4, device=DEVICE)
    three = torch.zeros(3, device=DEVICE)
    for w, dim in ((gaps, 0), (middle, 1), (torch.randn(3, 2, device=DEVICE).double(), 0)):
        several, specs = [weights[0], w, *weights[1:]], [integers(4, True, axis) for axis in (0, dim, *[0] * 4)]
        left, out, clips = launched(several, [hints[0], three, *hints[1:]], specs, "octav")
        assert left == [1]
        assert out[1].isnan().all()
        assert clips[3:6].isnan().all()
        assert launched(weights, hints, [integers(4, True, 0)] * 5, "octav")[2].equal(torch.cat([clips[:3], clips[6:]]))
    assert launched(weights, hints, [integers(4, True, 0)] * 5, "other")[0] == list(range(5))


@pytest.mark.parametrize("method", ["octav", "octav-grid", "max"])
def test_the_op_is_the_reference(method):
    weights, hints = some_weights()
    weights.append(torch.randn(2, 3, 4, device=DEVICE))
    hints.append(torch.zeros(3, device=DEVICE))
    specs = [*(integers(bits, True, 0) for bits in (8, 4, 4, 4, 3)), integers(4, True, 1)]
    quantized, clips = fake_quantize_weights(weights, hints, specs, method)
    torch.testing.assert_close(clips, reference.fake_quantize_weights(weights, hints, specs, method)[1], **CLOSE)
    parts = clips.split(list(map(len, hints)))
    for w, spec, y, clip in zip(weights, specs, quantized, parts, strict=True):
        assert_same_bits(y, fake_quantize(w, clip, spec, "ste"))


def test_no_weights_have_no_clips():
    quantized, clips = fake_quantize_weights([], [], [], "octav")
    assert quantized == []
    assert clips.shape == (0,)


def test_opcheck():
    weights, hints = some_weights()
    # It compares results, and NaN is not NaN.
    weights[1].nan_to_num_(0, 0, 0)
    torch.library.opcheck(fake_quantize_weights.default, (weights, hints, [integers(4, True, 0)] * 5, "octav"))


def test_it_is_registered_for_gpus():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("octav::fake_quantize_weights", "CUDA")
