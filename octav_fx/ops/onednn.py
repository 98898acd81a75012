"""oneDNN's integer convolutions and matmuls: weights packed once, and which products this machine adds up exactly.

torch ships oneDNN in its CPU builds. The kernels take unsigned codes of one byte (signed ones run thousands of times
slower) and compute f32(sum) * scale + bias, clamp, then rne(value * f32(1 / step) + zero) where codes are asked for. So
with an integer bias a code at a tie, one of some millions, is its neighbour of the definition's.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from octav_fx.compat.tensors import storage_id, version_of, without_modes
from octav_fx.formats.grid import Grid
from octav_fx.formats.packing import unpack

# Without VNNI two products are added in 16 bits, which saturate.
_SHORT: Final = (2**15 - 1) // 2
_ANY: Final = 255 * 128


def refusal(x_bits: int, largest: int) -> str | None:
    """Return why x_bits-bit codes cannot be multiplied with codes of a weight up to largest; None if they can."""
    if (limit := largest_product()) is None:
        return "torch has no oneDNN here that multiplies integers"
    if (2**x_bits - 1) * largest > limit:
        return f"{x_bits}-bit codes times {largest} saturate in 16 bits on this CPU, which has no VNNI"
    return None


def is_exact(call: Any, w: Tensor) -> bool:
    """Tell whether a call of integer_conv or integer_linear, with codes w int8 [O, ...], is added up exactly here."""
    if refusal(call.x_bits, largest_code(w)):
        return False
    return fits_sums(w, call.x_bits, call.x_signed, call.bias, call.fraction)


def fits_sums(w: Tensor, x_bits: int, x_signed: bool, bias: Tensor | None, fraction: int) -> bool:
    """Tell whether 32 bits hold every sum of products of codes with w int8 [O, ...], an integer bias among them."""
    grid = Grid(x_bits, x_signed)
    total = w.flatten(1).to(torch.int16).abs().sum(1, dtype=torch.int64) * max(grid.high, -grid.low) * 2**fraction
    if is_integer(bias):
        total = total + bias.to(torch.int64).abs()
    return bool((total < 2**31).all())


def extents(kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return how far a filter reaches along each axis."""
    return [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]


def fits_into_padding(kernel: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> bool:
    """Tell whether a filter fits into the padding: oneDNN takes the compensation of another place then (torch 2.13)."""
    return any(p >= extent for p, extent in zip(padding, extents(kernel, dilation), strict=True))


@functools.cache
def largest_product() -> int | None:
    """Return the largest product of two codes that oneDNN adds up exactly; None where it multiplies no integers.

    Found by trying: what the CPU has is not what oneDNN uses where ONEDNN_MAX_CPU_ISA limits it.
    """
    # A pass may ask while tensors are fake.
    with without_modes():
        return _largest_product()


def _largest_product() -> int | None:
    x, w = torch.full((4, 64), 255, dtype=torch.uint8), torch.full((16, 64), 127, dtype=torch.int8)
    expected, ones, zeros = 64 * 255 * 127, torch.ones(16), torch.zeros(16, dtype=torch.int32)
    try:
        flat = torch.ops.onednn.qlinear_pointwise(
            *(x, 1.0, 0, torch.ops.onednn.qlinear_prepack(w, None), ones, zeros, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        image, filters, window = x.reshape(4, 64, 1, 1), w.reshape(16, 64, 1, 1), ([1, 1], [0, 0], [1, 1], 1)
        conv = torch.ops.onednn.qconv_pointwise(
            *(image, 1.0, 0, torch.ops.onednn.qconv_prepack(filters, ones, 1.0, 0, *window, None), ones, zeros, None),
            *(*window, 1.0, 0, torch.float32, "none", [], ""),
        )
    except (RuntimeError, AttributeError, NotImplementedError):
        return None
    is_exact = bool((flat == expected).all()) and bool((conv == expected).all())
    return _ANY if is_exact else _SHORT


@dataclass(frozen=True, slots=True)
class _Derived:
    storages: list[StorageWeakRef]
    state: list[tuple[int, int, int]]
    value: Any


_DERIVED: Final[dict[Hashable, _Derived]] = {}


def derived(tensors: Sequence[Tensor | None], key: Hashable, make: Callable[[], Any]) -> Any:
    """Return what make() returns, made once for the present values of some tensors and each key.

    A write into one of them, as by load_state_dict, makes it anew; it goes with the memory of any. So a packed weight
    is part of no state. (A write through .data leaves no trace: copy the model after one.)
    """
    # The address of a storage is taken by no other while a weak reference holds it.
    state = [(storage_id(t), t.data_ptr(), version_of(t)) for t in tensors if t is not None]
    # Of all of them: one weight may read several inputs, each with a scale of its own (the heads of a detector).
    place = (*(entry[:2] for entry in state), key)
    known = _DERIVED.get(place)
    if known is not None and known.state == state:
        return known.value
    for gone in [other for other, entry in list(_DERIVED.items()) if _is_gone(entry)]:
        _DERIVED.pop(gone, None)
    made = _Derived([StorageWeakRef(t.untyped_storage()) for t in tensors if t is not None], state, make())
    _DERIVED[place] = made
    return made.value


def _is_gone(entry: _Derived) -> bool:
    return any(storage.expired() for storage in entry.storages)


Run = Callable[[Tensor], Tensor | None]


def planned(args: Sequence[Any], make: Callable[[], Run | None]) -> Run | None:
    """Return make() for the arguments of integer_conv or integer_linear, made once for all inputs of a layer.

    args: codes of the input, four others of its scale and grid, the codes of the weight, and so on, as the ops take
    them. A network has many layers, and the Python of a call takes as long as a small one.
    """
    weight = args[4]
    others = [value for value in args[1:] if isinstance(value, Tensor) and value is not weight]
    rest = (tuple(value) if isinstance(value, (list, tuple)) else value for value in args[1:])
    key = (args[0].dim(), *(value for value in rest if not isinstance(value, Tensor)))
    made: Run | None = derived((weight, *others), key, make)
    return made


def integers(codes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the codes of a weight as IntegerWeight stores them -> int8 of a shape."""
    return unpack(codes, shape) if codes.dtype is torch.uint8 else codes.reshape(shape)


def largest_code(codes: Tensor) -> int:
    """Return the largest magnitude among int8 codes; 0 if there are none."""
    return int(codes.to(torch.int16).abs().amax()) if codes.numel() else 0


def channel_scale(x_scale: Tensor, w_scale: Tensor, channels: int) -> Tensor:
    """Return the product of the scales, [channels]."""
    scale = x_scale * w_scale
    return scale if scale.dim() else scale.expand(channels).contiguous()


def is_integer(bias: Tensor | None) -> TypeGuard[Tensor]:
    """Tell whether a bias is one of integers, which counts parts of a product of codes."""
    return bias is not None and bias.dtype is torch.int32


def in_steps(call: Any) -> Any:
    """Return the call of a layer with an integer bias, its scale and bounds in units of the step of its codes.

    As near as oneDNN comes to nn/integer_rule.py: it adds the bias after it multiplies, one rounding more.
    """
    if call.step is None or not is_integer(call.bias):
        return call
    low, high = (None if end is None else end / float(call.step) for end in (call.low, call.high))
    one = torch.ones_like(call.step)
    return call._replace(x_scale=one, w_scale=call.x_scale * call.w_scale / call.step, low=low, high=high, step=one)


def bias_levels(bias: Tensor | None, scale: Tensor, fraction: int) -> Tensor | None:
    """Return a bias [O] as float32: of an integer one, in 2**-fraction of a sum that counts scale [O], the levels."""
    if not is_integer(bias):
        return None if bias is None else bias.to(torch.float32)
    return bias.float() * (scale / 2**fraction)


@functools.cache
def zeros(channels: int) -> Tensor:
    """Return the zero points of a weight, which are none."""
    return torch.zeros(channels, dtype=torch.int32)


@functools.cache
def zero_point(bits: int, signed: bool) -> int:
    """Return what stands for zero among codes that are counted from the lowest."""
    return -Grid(bits, signed).low


# Scale and zero point of the result, its dtype, the name of the clamp, its bounds, and no algorithm.
Epilogue = tuple[float, int, torch.dtype, str, list[float], str]


def epilogue(low: float | None, high: float | None, step: Tensor | None, bits: int, signed: bool) -> Epilogue:
    """Return the last arguments of oneDNN's calls: clamp to low .. high, then to codes where there is a step."""
    scale, zero, dtype = 1.0, 0, torch.float32
    if step is not None:
        scale, zero, dtype = float(step), zero_point(bits, signed), torch.uint8
        low, high = clamped(low, high, Grid(bits, signed), scale)
    if low is None and high is None:
        return scale, zero, dtype, "none", [], ""
    if low == 0 and high is None:
        return scale, zero, dtype, "relu", [], ""
    bounds = [-_LARGEST if low is None else low, _LARGEST if high is None else high]
    return scale, zero, dtype, "hardtanh", bounds, ""


_LARGEST: Final = torch.finfo(torch.float32).max


def ends(low: float | None, high: float | None) -> tuple[float, float]:
    """Return the bounds of a clamp, infinite where it has none."""
    return -math.inf if low is None else low, math.inf if high is None else high


def code_bounds(low: float | None, high: float | None, step: Tensor, grid: Grid) -> tuple[float, float]:
    """Return the codes of the bounds of a clamp, on a grid of steps."""
    bottom, top = (torch.tensor(ends(low, high), device=step.device) / step).round().clamp(grid.low, grid.high).tolist()
    return bottom, top


def clamped(low: float | None, high: float | None, grid: Grid, step: float) -> tuple[float | None, float | None]:
    """Return the bounds of a clamp and of a grid in one. A byte ends where codes of 8 bits do, so these need none."""
    if grid.bits == 8:
        return (None if low == 0 and not grid.signed else low), high
    bottom, top = max(grid.low * step, -_LARGEST), min(grid.high * step, _LARGEST)
    return (bottom if low is None else max(low, bottom)), (top if high is None else min(high, top))
