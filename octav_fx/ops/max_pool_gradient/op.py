"""torch.ops.octav.max_pool_gradient: the gradient of a max pool, by torch's own kernel.

It scatters. What Inductor generates looks at all windows of each place: thirty times as long on a CPU (torch 2.13).
"""

from octav_fx.ops.max_pool_gradient import reference
from octav_fx.ops.register import LAYOUT_AGNOSTIC, register_allocating

max_pool_gradient = register_allocating(
    "max_pool_gradient",
    "Tensor grad, Tensor indices, int[] size, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    "bool ceil_mode",
    empty=reference.empty,
    reference=reference.max_pool_gradient,
    cpu=reference.max_pool_gradient,
    tags=LAYOUT_AGNOSTIC,
)
