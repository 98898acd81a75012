"""torch.ops.octav.grouped_mm: rows times the weights of their group, where torch compiles no F.grouped_mm.

torch knows shapes of it for bfloat16 alone (2.13), although its kernels take float32: this op is for compiled graphs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from octav_fx.ops.grouped_mm import reference
from octav_fx.ops.register import register_op


def grouped_product(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return F.grouped_mm of the same arguments, by the op where a compiler asks for shapes that torch has not."""
    if mat_a.dtype != mat_b.dtype:
        # Autocast has no rule for it: quantized rows come in its dtype, weights and the result keep theirs.
        mat_a = mat_a.to(mat_b.dtype)
    are_rows = mat_a.dim() == 2 and mat_b.dim() == 3 and mat_a.dtype != torch.bfloat16
    if torch.compiler.is_compiling() and are_rows and offs is not None and bias is None and out_dtype is None:
        found: Tensor = torch.ops.octav.grouped_mm(mat_a, mat_b, offs)
        return found
    return F.grouped_mm(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)


def _products(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])


def _weights(rows: Tensor, gradient: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0], rows.shape[1], gradient.shape[1])


register_op("grouped_mm", "Tensor rows, Tensor weights, Tensor ends", empty=_products, reference=reference.grouped_mm)
register_op(
    "grouped_mm_weights",
    "Tensor rows, Tensor gradient, Tensor ends",
    empty=_weights,
    reference=reference.grouped_mm_weights,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weights, ends = ctx.saved_tensors
    # That of a sum is one number, expanded.
    gradient = gradient.contiguous()
    of_rows = torch.ops.octav.grouped_mm(gradient, weights.transpose(1, 2), ends)
    return of_rows, torch.ops.octav.grouped_mm_weights(rows, gradient, ends), None


torch.library.register_autograd("octav::grouped_mm", _gradients, setup_context=_save)
