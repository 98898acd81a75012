"""dequantize, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.formats.format import representable
from octav_fx.formats.spec import spec_of


def dequantize(codes: Tensor, clip: Tensor, spec: str, dtype: torch.dtype) -> Tensor:
    """Return codes [...] from quantize, clip [] or [C] -> the levels [...] in dtype; what was not finite is NaN.

    dequantize(quantize(x, clip), clip) equals fake_quantize(x, clip) exactly where x is finite, but for the sign of
    a zero.
    """
    represented = spec_of(spec)
    form, clip = represented.fitted(clip)
    value = torch.promote_types(dtype, torch.float32)
    code = codes if form.signed else torch.where(codes >= form.ceiling_flag, codes - form.ceiling_flag, codes)
    level = form.levels(code.clamp(form.low, form.high).to(value))
    level = level * form.step(represented.granularity.along(clip, codes).to(value))
    return torch.where(codes == torch.iinfo(codes.dtype).min, torch.nan, representable(level, dtype)).to(dtype)


def levels_of(x: Tensor, clip: Tensor, spec: str, dtype: torch.dtype) -> Tensor:
    """Return dequantize(quantize(x, clip), clip) [...] in dtype without the codes, but for the sign of a zero."""
    represented = spec_of(spec)
    form, clip = represented.fitted(clip)
    value = x.to(torch.promote_types(dtype, torch.float32))
    step = form.step(represented.granularity.along(clip, x).to(value.dtype))
    level = torch.where(step > 0, form.round(value / step), 0)
    return torch.where(x.isfinite(), representable(level * step, dtype), torch.nan).to(dtype)
