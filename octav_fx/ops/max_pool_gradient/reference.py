"""max_pool_gradient, in pure torch: the definition."""

import torch
from torch import Tensor


def max_pool_gradient(
    grad: Tensor,
    indices: Tensor,
    size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> Tensor:
    """Return the gradient [N, C, H, W] = size of what was pooled, from that of the result and the indices of maxima."""
    # Of what was pooled only size and layout are asked.
    x = empty(grad, indices, size)
    window = kernel_size, stride, padding, dilation, ceil_mode
    y: Tensor = torch.ops.aten.max_pool2d_with_indices_backward.default(grad, x, *window, indices)
    return y


def empty(grad: Tensor, indices: Tensor, size: list[int], *window: object) -> Tensor:
    """Return memory for the result, which lies as grad does."""
    is_last = grad.stride(1) == 1 and grad.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_last else torch.contiguous_format
    return torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=layout)
