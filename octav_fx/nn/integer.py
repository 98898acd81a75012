"""What the graph of an integer model calls: ops on codes, as functions, so that a graph copies and pickles."""

from typing import Any

import torch
from torch import Tensor

from octav_fx.ops.integer_codes import reference


def integer_codes(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    """X [...] -> codes uint8 [...], counted from the lowest: ops/integer_codes."""
    # Written out, so that a compiler can put it at the end of what computes x.
    if torch.compiler.is_compiling():
        return reference.integer_codes(x, scale, bits, signed)
    return torch.ops.octav.integer_codes.default(x, scale, bits, signed)


def integer_conv(*args: Any, **kwargs: Any) -> Tensor:
    """Codes uint8 [N, C, ...] -> float32, or the codes of a next layer, [N, O, ...]: ops/integer_conv."""
    return torch.ops.octav.integer_conv.default(*args, **kwargs)


def integer_linear(*args: Any, **kwargs: Any) -> Tensor:
    """Codes uint8 [..., K] -> float32, or the codes of a next layer, [..., O]: ops/integer_linear."""
    return torch.ops.octav.integer_linear.default(*args, **kwargs)


def integer_max_pool(*args: Any) -> Tensor:
    """Codes uint8 [N, C, H, W] -> the largest of each window: ops/integer_max_pool."""
    return torch.ops.octav.integer_max_pool.default(*args)


def integer_conv_add(total: Tensor, relu: bool, *args: Any) -> Tensor:
    """integer_conv of args, added to total, with a relu or not; total is not read again, so its memory may be taken."""
    x, shape, (stride, padding, dilation) = args[0], args[6], args[8:11]
    moved = zip(x.shape[2:], shape[2:], stride, padding, dilation, strict=True)
    size = (x.shape[0], shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in moved))
    if total.shape == size and total.dtype is torch.float32:
        torch.ops.octav.integer_conv_add_.default(total, relu, *args)
        return total
    y = total + integer_conv(*args)
    return y.relu() if relu else y
