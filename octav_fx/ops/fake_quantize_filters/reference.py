"""fake_quantize_filters and its gradient, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.ops.fake_quantize import reference


def fake_quantize_filters(filters: Tensor, clip: Tensor, spec: str, dtype: torch.dtype | None = None) -> Tensor:
    """Filters [C, I, K], clip [C] -> fake-quantized [C, K, I]: the input channels last, as convolutions read them.

    In a dtype, if given, else in that of the filters.
    """
    levels = reference.fake_quantize(filters, clip, spec, "ste", dtype)
    return levels.transpose(1, 2).contiguous()


def fake_quantize_filters_backward(grad: Tensor, filters: Tensor, clip: Tensor, spec: str, gradient: str) -> Tensor:
    """Grad [C, I, *spatial] in any layout, filters [C, I, K], clip [C] -> the gradient of the filters, [C, I, K]."""
    return reference.fake_quantize_backward(grad.reshape(filters.shape), filters, clip, spec, gradient)
