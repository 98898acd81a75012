"""integer_max_pool, in pure torch: the definition."""

import torch
from torch import Tensor
from torch.nn import functional as F


def integer_max_pool(
    x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    """Codes x uint8 [N, C, H, W] -> the largest code of each window [N, C, H', W'], uint8; two numbers in each list.

    Codes rise with their levels: it is the code of the largest level. Positions of the padding count nothing.
    """
    largest = F.max_pool2d(x.to(torch.int32), kernel_size, stride, padding, dilation, ceil_mode)
    # A window without a position of x in it has the least of its dtype.
    return largest.clamp(min=0).to(torch.uint8)
