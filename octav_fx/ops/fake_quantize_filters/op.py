"""torch.ops.octav.fake_quantize_filters: the weight of a convolution, fake-quantized into the layout it is read in.

Compiled convolutions on a CPU want their input channels last, parameters have them before the kernel's positions.
By itself the conversion is a pass over all weights, forward and backward, and over all gradients.
"""

import torch
from torch import Tensor

from octav_fx.formats.grid import Grid
from octav_fx.ops import cpu
from octav_fx.ops.fake_quantize_filters import reference
from octav_fx.ops.register import register_op


def _empty(filters: Tensor, clip: Tensor, bits: int, signed: bool) -> Tensor:
    channels, inputs, positions = filters.shape
    return filters.new_empty(channels, positions, inputs)


def _cpu(filters: Tensor, clip: Tensor, bits: int, signed: bool, out: Tensor) -> bool:
    library = cpu.library()
    floats = filters.dtype is torch.float32 and out.dtype is torch.float32
    channels, inputs, positions = filters.shape
    contiguous = filters.is_contiguous() and out.is_contiguous() and out.shape == (channels, positions, inputs)
    if library is None or not floats or not contiguous:
        return False
    grid = Grid(bits, signed)
    clip = cpu.checked(clip, (filters.shape[0],))
    library.octav_fake_quantize_filters(
        filters.data_ptr(),
        clip.data_ptr(),
        out.data_ptr(),
        *filters.shape,
        grid.steps,
        grid.low,
        grid.high,
        torch.get_num_threads(),
    )
    return True


fake_quantize_filters = register_op(
    "fake_quantize_filters",
    "Tensor filters, Tensor clip, int bits, bool signed",
    empty=_empty,
    reference=reference.fake_quantize_filters,
    cpu=_cpu,
)


def _empty_gradient(grad: Tensor, filters: Tensor, clip: Tensor, signed: bool, gradient: str) -> Tensor:
    return torch.empty_like(filters, dtype=grad.dtype)


def _cpu_gradient(grad: Tensor, filters: Tensor, clip: Tensor, signed: bool, gradient: str, out: Tensor) -> bool:
    library = cpu.library()
    floats = all(tensor.dtype is torch.float32 for tensor in (grad, filters, out))
    contiguous = filters.is_contiguous() and out.is_contiguous() and out.shape == filters.shape
    channels_last = grad.movedim(1, -1).is_contiguous()
    if library is None or not floats or not contiguous or not (channels_last or grad.is_contiguous()):
        return False
    clip = cpu.checked(clip, (filters.shape[0],))
    library.octav_fake_quantize_filters_backward(
        grad.data_ptr(),
        filters.data_ptr(),
        clip.data_ptr(),
        out.data_ptr(),
        *filters.shape,
        channels_last,
        signed,
        ("ste", "pwl", "mad").index(gradient),
        torch.get_num_threads(),
    )
    return True


fake_quantize_filters_backward = register_op(
    "fake_quantize_filters_backward",
    "Tensor grad, Tensor filters, Tensor clip, bool signed, str gradient",
    empty=_empty_gradient,
    reference=reference.fake_quantize_filters_backward,
    cpu=_cpu_gradient,
)
