"""int_matmul, in pure torch: the definition."""

from typing import Final

import torch
from torch import Tensor

from octav_fx.errors import OctavError
from octav_fx.ops.int_matmul.range import offset

# What holds codes: any of 8 bits, or integers up to 16.
OPERANDS: Final = (torch.int8, torch.float8_e4m3fn)


def int_matmul(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_bits: int,
    x_signed: bool,
    w_bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return codes x [M, K] and w [N, K], scales x_scale [] or [M] and w_scale [] or [N] -> [M, N] in dtype.

    The levels of x are (x + offset) * x_scale, those of w are w * w_scale, and the result is levels of x times levels
    of w transposed plus bias [N]. offset is 128 where codes are 0..255, so that they fit int8, else 0.
    Codes are int8 or, both, float8_e4m3fn, which holds integers up to 16. The sum of integers is exact. It is
    multiplied by the product of the scales and bias is added, in float64; that is rounded to float32 once, and from
    there to dtype as torch rounds a float32.
    """
    check(x, x_scale, w, w_scale, bias)
    # Every sum is an integer below 2**53, for any K that fits a memory: exact in float64, in any order.
    total = (x.to(torch.float64) + offset(x_bits, x_signed)) @ w.to(torch.float64).t()
    rows, columns = (scale.to(torch.float64) for scale in (x_scale, w_scale))
    y = total * (rows[:, None] * columns if rows.dim() else rows * columns)
    if bias is not None:
        y = y + bias.to(torch.float64)
    return y.to(torch.float32).to(dtype)


def check(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> None:
    """Raise OctavError for what the kernel would read beyond the end of."""
    fits = x.dim() == w.dim() == 2 and x.shape[1] == w.shape[1]
    if not fits or x.dtype is not w.dtype or x.dtype not in OPERANDS:
        raise OctavError(
            f"int_matmul takes codes [M, K] and [N, K], both int8 or both float8_e4m3fn, "
            f"not {tuple(x.shape)} and {tuple(w.shape)} of {x.dtype} and {w.dtype}"
        )
    for name, value, length in (("x_scale", x_scale, len(x)), ("w_scale", w_scale, len(w)), ("bias", bias, len(w))):
        if value is not None and value.shape != (length,) and (value.dim() or name == "bias"):
            raise OctavError(f"int_matmul: {name} has shape {tuple(value.shape)} where [{length}] is asked for")
