"""fake_quantize and its gradient, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.clips.gradients import GRADIENTS
from octav_fx.formats.format import representable
from octav_fx.formats.spec import spec_of


def fake_quantize(x: Tensor, clip: Tensor, spec: str, gradient: str, dtype: torch.dtype | None = None) -> Tensor:
    """Map x [...], clip [] or [C] in the units of x -> [...], the nearest level, ties to the even code; the dtype of x.

    With a dtype: in that. Levels of half precision are those of float32, rounded once.

    A clip of 0 sends every value to 0. A level that the dtype of x does not hold is the greatest number that it holds.
    Values that are not finite stay what they are, so that they are not hidden.
    """
    represented = spec_of(spec)
    form, clip = represented.fitted(clip)
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    step = form.step(represented.granularity.along(clip, x).to(value.dtype))
    # Not a multiplication by steps / clip: that rounds twice and moves ties.
    level = torch.where(step > 0, form.round(value / step), 0)
    return torch.where(x.isfinite(), representable(level * step, x.dtype), value).to(dtype or x.dtype)


def fake_quantize_backward(grad: Tensor, x: Tensor, clip: Tensor, spec: str, gradient: str) -> Tensor:
    """Return grad and x [...], clip [] or [C] -> the gradient of x [...], the dtype of x."""
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    represented = spec_of(spec)
    form, clip = represented.fitted(clip)
    bound = represented.granularity.along(clip, x).to(value.dtype)
    factor = GRADIENTS[gradient](value, bound, form.signed)
    return (grad.to(value.dtype) * factor).to(x.dtype)
