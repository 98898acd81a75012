"""max_pool_gradient, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.compat.tensors import memory_format_of


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
    return torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format_of(grad))
