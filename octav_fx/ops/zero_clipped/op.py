"""torch.ops.octav.zero_clipped_: the piecewise-linear gradient where it lies: what was clipped gets none.

A GPU reads the codes, a byte for each element, and writes the few elements that were clipped; a gradient that is masked
into other memory is read and written whole. For gradients that no kernel of Inductor's makes or reads: those pass the
mask on their way.
"""

import torch
from torch import Tensor

from octav_fx.ops.register import LAYOUT_AGNOSTIC, has_triton
from octav_fx.ops.zero_clipped import reference


def _cuda(grad: Tensor, codes: Tensor, low: int, high: int) -> None:
    with torch.cuda.device(grad.device):
        if has_triton():
            from octav_fx.ops.zero_clipped import kernel

            if kernel.zero_clipped_(grad, codes, low, high):
                return
    reference.zero_clipped_(grad, codes, low, high)


_NAME = "octav::zero_clipped_"
torch.library.define(_NAME, "(Tensor(a!) grad, Tensor codes, int low, int high) -> ()", tags=LAYOUT_AGNOSTIC)
torch.library.impl(_NAME, "CompositeExplicitAutograd", reference.zero_clipped_)
torch.library.impl(_NAME, "CUDA", _cuda)
torch.library.register_fake(_NAME, lambda grad, codes, low, high: None)
zero_clipped_ = torch.ops.octav.zero_clipped_
