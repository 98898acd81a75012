"""The quantizer's two functions on plain tensors."""

import torch
from torch import Tensor

import octav_fx.ops  # noqa: F401  registers torch.ops.octav
from octav_fx.clips.gradients import GRADIENTS
from octav_fx.clips.methods import METHODS
from octav_fx.errors import OctavError
from octav_fx.formats.granularity import clip_shape
from octav_fx.formats.spec import integers

_BITS = range(2, 9)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def optimal_clip(x: Tensor, bits: int, *, signed: bool = True, dim: int | None = None, method: str = "octav") -> Tensor:
    """Find the clip with the least quantization error (arXiv 2206.06501, eq. 6), from scratch.

    x [...] floating point; zeros, inf and NaN do not take part. dim is the channel axis for one clip per index of it.
    method is one of Config's clips that is not learned: "octav", "octav-grid", "octav-tight", "max", "percentile",
    "mse". Returns float32 in the units of x, [] or [C]; 0 where there is nothing but zeros. Raises OctavError for
    integers, bits outside of 2..8, or an axis that x does not have.
    """
    axis = _check(x, bits, dim)
    if method not in METHODS:
        raise OctavError(f"method={method!r}: one of {', '.join(map(repr, METHODS))}")
    hint = x.new_zeros(clip_shape(x, axis), dtype=torch.float32)
    return torch.ops.octav.optimal_clip(x.detach(), hint, integers(bits, signed, axis), method)


def fake_quantize(
    x: Tensor, clip: Tensor, bits: int, *, signed: bool = True, gradient: str = "pwl", dim: int | None = None
) -> Tensor:
    """Round x to the grid of a clip (formats/grid.py), with a gradient for x and none for the clip.

    x [...] floating point, clip [] or, with the channel axis dim, [C], in the units of x. gradient is "pwl", "mad" or
    "ste" (clips/gradients.py). Returns [...] in the dtype of x; inf and NaN pass through. Raises OctavError for
    integers, bits outside of 2..8, an axis that x does not have, or a clip of another shape.
    """
    axis = _check(x, bits, dim)
    if gradient not in GRADIENTS:
        raise OctavError(f"gradient={gradient!r}: one of {', '.join(map(repr, GRADIENTS))}")
    clip = torch.as_tensor(clip, device=x.device)
    if clip.shape != clip_shape(x, axis):
        shapes = f"clip of shape {tuple(clip.shape)} for x of shape {tuple(x.shape)} and dim={dim}"
        raise OctavError(f"{shapes}: give a clip of shape {clip_shape(x, axis)}")
    return torch.ops.octav.fake_quantize(x, clip.detach().to(torch.float32), integers(bits, signed, axis), gradient)


def _check(x: Tensor, bits: int, dim: int | None) -> int | None:
    """Raise OctavError for what cannot be quantized; return the channel axis counted from the front."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        raise OctavError(
            f"x is {f'a {x.layout} tensor' if isinstance(x, Tensor) else type(x).__name__}: give a dense tensor"
        )
    if x.dtype not in _DTYPES:
        raise OctavError(
            f"x has dtype {x.dtype} and shape {tuple(x.shape)}: give one of {', '.join(map(str, _DTYPES))}"
        )
    if not isinstance(bits, int) or bits not in _BITS:
        raise OctavError(f"bits={bits!r}: whole bits from {_BITS.start} to {_BITS.stop - 1}")
    if dim is None:
        return None
    if not -x.dim() <= dim < x.dim():
        raise OctavError(f"dim={dim} for x of shape {tuple(x.shape)}: it has no such axis")
    return dim % x.dim()
