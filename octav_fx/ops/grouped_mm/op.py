"""torch.ops.octav.grouped_mm: rows times the weights of their group, and zeros for rows of no group.

torch leaves what lies beyond the last group unwritten, in the products and in the gradient of the rows. A clip that is
measured over chance values is chance itself, and so is the gradient of a learned one. Nor does torch compile
F.grouped_mm in float32 (2.13), although its kernels take it.
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
    """Return F.grouped_mm of the same arguments, with zeros where it writes nothing."""
    if mat_a.dtype != mat_b.dtype:
        # Autocast has no rule for it: quantized rows come in its dtype, weights and the result keep theirs.
        mat_a = mat_a.to(mat_b.dtype)
    if mat_a.dim() == 2 and mat_b.dim() == 3 and offs is not None and bias is None and out_dtype is None:
        found: Tensor = torch.ops.octav.grouped_mm(mat_a, mat_b, offs)
        return found
    products = F.grouped_mm(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)
    if offs is None or mat_a.dim() == mat_b.dim():
        return products
    beyond = reference.beyond_groups(products.shape[1 if mat_b.dim() == 2 else 0], offs)
    return products.masked_fill(beyond if mat_b.dim() == 2 else beyond.unsqueeze(-1), 0)


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


def _gradients_of_weights(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, of_products, ends = ctx.saved_tensors
    gradient = gradient.contiguous()
    of_rows = torch.ops.octav.grouped_mm(of_products, gradient.transpose(1, 2), ends)
    return of_rows, torch.ops.octav.grouped_mm(rows, gradient, ends), None


torch.library.register_autograd("octav::grouped_mm", _gradients, setup_context=_save)
torch.library.register_autograd("octav::grouped_mm_weights", _gradients_of_weights, setup_context=_save)
