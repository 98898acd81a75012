"""max_pool, in pure torch: the definition."""

import torch
from torch import Tensor
from torch.nn import functional as F


def max_pool(
    x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    """X [N, C, H, W], codes uint8 or floats -> the largest of each window [N, C, H', W']; two numbers in each list.

    Codes rise with their levels: it is the code of the largest level. Positions of the padding count nothing. A window
    of nothing but them has the code 0, or -inf. NaN is the largest of all.
    """
    window = kernel_size, stride, padding, dilation, ceil_mode
    if x.dtype is not torch.uint8:
        return F.max_pool2d(x, *window)
    # There the least of int32.
    return F.max_pool2d(x.to(torch.int32), *window).clamp(min=0).to(torch.uint8)
