"""max_pool: the code of the largest level, and the largest float."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from octav_fx.ops.max_pool import reference
from octav_fx.ops.max_pool.op import max_pool

PAIR = st.lists(st.integers(1, 3), min_size=2, max_size=2)


@settings(max_examples=200)
@given(
    kernel=PAIR,
    stride=PAIR,
    dilation=PAIR,
    padded=st.booleans(),
    ceil_mode=st.booleans(),
    channels=st.sampled_from([1, 3, 64]),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    is_last=st.booleans(),
    is_float=st.booleans(),
)
def test_the_kernel_is_the_reference(
    kernels, kernel, stride, dilation, padded, ceil_mode, channels, height, width, is_last, is_float
):
    padding = [k // 2 if padded else 0 for k in kernel]
    extent = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    assume(height >= extent[0] and width >= extent[1])
    x = torch.randint(0, 256, (2, channels, height, width), dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last) if is_last else x
    if is_float:
        x = torch.where(x == 7, float("nan"), torch.where(x < 9, -torch.inf, x - 128.5))
    window = (kernel, stride, padding, dilation, ceil_mode)
    y = max_pool(x, *window)
    torch.testing.assert_close(y, reference.max_pool(x, *window), rtol=0, atol=0, equal_nan=True)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_the_reference_is_torchs():
    x = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8)
    expected = F.max_pool2d(x.float(), 3, 2, 1)
    assert torch.equal(reference.max_pool(x, [3, 3], [2, 2], [1, 1], [1, 1], False).float(), expected)


def test_opcheck(kernel_calls):
    x = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8)
    torch.library.opcheck(max_pool.default, (x.float(), [2, 2], [2, 2], [0, 0], [1, 1], False))
    window = ([3, 3], [2, 2], [1, 1], [1, 1], False)
    torch.library.opcheck(max_pool.default, (x, *window))
    assert set(kernel_calls) == {"octav_max_pool"}
