"""torch.ops.octav.int_matmul: a matmul of integer codes, exact, with scales and bias at its end."""

from typing import Any

import torch
from torch import Tensor

from octav_fx.ops.int_matmul import reference
from octav_fx.ops.register import register_op


def _empty(
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
    return x.new_empty((x.shape[0], w.shape[0]), dtype=dtype)


def _cuda(*args: Any, out: Tensor) -> bool:
    from octav_fx.ops.int_matmul import kernel

    return kernel.int_matmul(*args, out=out)


int_matmul = register_op(
    "int_matmul",
    "Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor? bias, "
    "int x_bits, bool x_signed, int w_bits, ScalarType dtype",
    empty=_empty,
    reference=reference.int_matmul,
    cuda=_cuda,
)
