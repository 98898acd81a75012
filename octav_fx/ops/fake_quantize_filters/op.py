"""torch.ops.octav.fake_quantize_filters: the weight of a convolution, fake-quantized into the layout it is read in.

Compiled convolutions on a CPU want their input channels last, parameters have them before the kernel's positions.
By itself the conversion is a pass over all weights, forward and backward, and over all gradients.
"""

import torch
from torch import Tensor

from octav_fx.formats.spec import spec_of
from octav_fx.ops import cpu
from octav_fx.ops.fake_quantize_filters import reference
from octav_fx.ops.register import register_op


def _empty(filters: Tensor, clip: Tensor, spec: str, dtype: torch.dtype | None = None) -> Tensor:
    channels, inputs, positions = filters.shape
    return filters.new_empty(channels, positions, inputs, dtype=dtype)


def _cpu(filters: Tensor, clip: Tensor, spec: str, dtype: torch.dtype | None = None, *, out: Tensor) -> bool:
    if (plain := spec_of(spec).plain) is None:
        return False
    (grid, _), library = plain, cpu.library()
    channels, inputs, positions = filters.shape
    fits = out.shape == (channels, positions, inputs) and out.dtype is (dtype or filters.dtype)
    if library is None or not fits or not out.is_contiguous():
        return False
    if (types := cpu.types_of("fake_quantize_filters", filters, out)) is None:
        return False
    filters_type, out_type = types
    filters, clip = filters.contiguous(), cpu.checked(clip, (channels,))
    library.octav_fake_quantize_filters(
        filters.data_ptr(),
        filters_type,
        clip.data_ptr(),
        out.data_ptr(),
        out_type,
        *filters.shape,
        grid.steps,
        grid.low,
        grid.high,
        torch.get_num_threads(),
    )
    return True


fake_quantize_filters = register_op(
    "fake_quantize_filters",
    "Tensor filters, Tensor clip, str spec, ScalarType? dtype=None",
    empty=_empty,
    reference=reference.fake_quantize_filters,
    cpu=_cpu,
)


def _empty_gradient(grad: Tensor, filters: Tensor, clip: Tensor, spec: str, gradient: str) -> Tensor:
    return torch.empty_like(filters)


def _cpu_gradient(grad: Tensor, filters: Tensor, clip: Tensor, spec: str, gradient: str, out: Tensor) -> bool:
    if (plain := spec_of(spec).plain) is None:
        return False
    (grid, _), library = plain, cpu.library()
    fits = out.shape == filters.shape and out.dtype is filters.dtype and grad.numel() == filters.numel()
    if library is None or not fits or not out.is_contiguous():
        return False
    if (types := cpu.types_of("fake_quantize_filters_backward", grad, filters)) is None:
        return False
    grad_type, filters_type = types
    channels_last = grad.movedim(1, -1).is_contiguous()
    grad = grad if channels_last else grad.contiguous()
    filters, clip = filters.contiguous(), cpu.checked(clip, (filters.shape[0],))
    library.octav_fake_quantize_filters_backward(
        grad.data_ptr(),
        grad_type,
        filters.data_ptr(),
        filters_type,
        clip.data_ptr(),
        out.data_ptr(),
        *filters.shape,
        channels_last,
        grid.signed,
        ("ste", "pwl", "mad").index(gradient),
        torch.get_num_threads(),
    )
    return True


fake_quantize_filters_backward = register_op(
    "fake_quantize_filters_backward",
    "Tensor grad, Tensor filters, Tensor clip, str spec, str gradient",
    empty=_empty_gradient,
    reference=reference.fake_quantize_filters_backward,
    cpu=_cpu_gradient,
)
