"""quantize, in pure torch: the definition."""

import torch
from torch import Tensor

from octav_fx.formats.spec import spec_of


def quantize(x: Tensor, clip: Tensor, spec: str, ceiling: float | None = None) -> Tensor:
    """Map x [...] and a clip of its granularity -> the nearest codes [...], and some more for backward's sake.

    A value beyond the clip gets a code beyond those of the grid, high + 1 or underflow_code: there the gradient is cut.
    On an unsigned grid zero itself gets low - 1, so that codes >= 0 are the values above zero, which is what the
    gradient of a relu asks for; and with a ceiling, that of a clamp that x comes from, the code of a value that has
    reached it is raised by ceiling_flag, which is what the gradient of a relu6 asks for.
    inf and NaN get the least number of the dtype.
    """
    represented = spec_of(spec)
    form, clip = represented.fitted(clip)
    value = x.to(torch.promote_types(x.dtype, torch.float32))
    bound = represented.granularity.along(clip, x).to(value.dtype)
    step = form.step(bound)
    code = torch.where(step > 0, form.codes(value / step), 0)
    code = torch.where(value > bound, form.high + 1, code)
    code = torch.where(value < (-bound if form.signed else 0), form.underflow_code, code)
    if not form.signed:
        code = torch.where(value == 0, form.low - 1, code)
        code = torch.where(value >= (torch.inf if ceiling is None else ceiling), code + form.ceiling_flag, code)
    return torch.where(x.isfinite(), code, torch.iinfo(form.codes_dtype).min).to(form.codes_dtype)
