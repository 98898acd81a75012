"""What a converted model is made of: modules of plain PyTorch ops, whose buffers are all that has to be stored."""

from typing import Final

import torch
from torch import Tensor, nn

from octav_fx.compat.modules import apply_to_tensors
from octav_fx.formats.format import representable
from octav_fx.formats.granularity import along
from octav_fx.formats.grid import Grid
from octav_fx.formats.packing import integer_codes, pack, unpack
from octav_fx.formats.spec import Spec

# Codes of so many bits are stored two to a byte.
PACKED: Final = 4
# A clip of zero sends every value to zero. Of one channel that is a step that no value reaches half of; of a tensor
# codes that saturate at zero, in a step that is a fine grid for the bias of a layer.
BEYOND: Final = 2.0**126
_FINE: Final = 2.0**-12


class IntegerWeight(nn.Module):
    """() -> the weight, scale * code [...], in the dtype that the model computes in.

    codes: int8 [...], or uint8 [(n + 1) // 2] with two to a byte for up to 4 bits. scale: float32 [] or, with the
    channel axis dim, [C]; negative where the factor of a batch norm is. The same values that the frozen fake-quantizer
    computes from the float weight, times that factor.
    codes_as: None, or the dtype in which forward returns the codes, for a product that is scaled afterwards.
    fraction: so many bits below one has the bias of the layer: see IntegerBias.
    """

    codes: Tensor
    scale: Tensor
    codes_as: torch.dtype | None = None
    fraction: int = 0

    def __init__(self, weight: Tensor, clip: Tensor, bits: int, dim: int | None, narrow: bool = False) -> None:
        super().__init__()
        self.bits, self.dim, self.shape, self.dtype = bits, dim, tuple(weight.shape), weight.dtype
        grid = Grid(bits, True, narrow)
        self.register_buffer("codes", None)
        self.store(integer_codes(weight.detach(), clip, grid, dim))
        self.register_buffer("scale", grid.step(clip.detach()).clone())

    def integers(self) -> Tensor:
        """Return the codes [...], int8."""
        return unpack(self.codes, self.shape) if self.bits <= PACKED else self.codes

    def store(self, codes: Tensor) -> None:
        """Take other codes [...], int8, of the same width."""
        self.codes = pack(codes) if self.bits <= PACKED else codes.contiguous()

    def transpose(self) -> None:
        """Swap the two axes of a matrix: its codes, its shape, and the axis of its scales."""
        codes, rows = self.integers().t(), self.shape[::-1]
        self.shape, self.dim = rows, None if self.dim is None else 1 - self.dim % 2
        self.store(codes.contiguous())

    def forward(self) -> Tensor:
        """See the class."""
        if self.codes_as is not None:
            return self.integers().to(self.codes_as)
        codes = self.integers().to(torch.promote_types(self.dtype, torch.float32))
        return (codes * along(self.scale, codes, self.dim).to(codes.dtype)).to(self.dtype)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self.dtype = dtype_after(fn, self.dtype)
        return _keep_float32(self, fn, recurse)

    def extra_repr(self) -> str:
        """Show bits, shape and granularity."""
        return f"{self.bits} bits, {self.shape}, {'per-tensor' if self.dim is None else f'per-channel dim={self.dim}'}"


class StaticQuantizer(nn.Module):
    """X [...] -> the nearest level, scale * code [...], ties to the even code.

    Levels are of the dtype of x; under autocast of float32 at least, as its dtypes do not hold them.
    scale: float32 [] or [C]. What ops/fake_quantize computes of finite values; inf saturates here.
    floor, ceiling: ends of a clamp that the saturation of the codes stands for, in the units of x; None: none.
    in_steps: whether x comes in units of the step, as the modules of nn/integer_rule.py return it.
    """

    scale: Tensor

    def __init__(self, clip: Tensor, bits: int, signed: bool, dim: int | None) -> None:
        super().__init__()
        self.bits, self.signed, self.dim = bits, signed, dim
        self.floor: float | None = None
        self.ceiling: float | None = None
        self.in_steps = False
        step = Grid(bits, signed).step(clip.detach())
        if dim is None and not step > 0:
            self.floor, self.ceiling = 0.0 if signed else None, 0.0
        self.register_buffer("scale", torch.where(step > 0, step, _FINE if dim is None else BEYOND))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        grid = Grid(self.bits, self.signed)
        value = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = along(self.scale, x, self.dim).to(value.dtype)
        code = (value if self.in_steps else value / scale).round()
        if self.floor is not None:
            code = code.maximum((self.floor / scale).round())
        if self.ceiling is not None:
            code = code.minimum((self.ceiling / scale).round())
        keeps = x.is_floating_point() and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
        return (code.clamp(grid.low, grid.high) * scale).to(x.dtype if keeps else value.dtype)

    def narrow(self, low: float | None, high: float | None) -> bool:
        """Saturate at the ends of a clamp, too. Return False, and do nothing, where its range and the present part."""
        floor = max((end for end in (self.floor, low) if end is not None), default=None)
        ceiling = min((end for end in (self.ceiling, high) if end is not None), default=None)
        if floor is not None and ceiling is not None and floor > ceiling:
            return False
        # An unsigned grid begins at zero by itself.
        self.floor, self.ceiling = None if floor is not None and floor <= 0 and not self.signed else floor, ceiling
        return True

    @property
    def range(self) -> tuple[int, int]:
        """Return the lowest and the highest code that forward returns the level of; with ends, of one scale only."""
        grid = Grid(self.bits, self.signed)
        if self.floor is None and self.ceiling is None:
            return grid.low, grid.high
        ends = torch.tensor([grid.low if self.floor is None else self.floor, self.ceiling or 0.0])
        floor, ceiling = (ends.to(self.scale.device) / self.scale).round().tolist()
        low = grid.low if self.floor is None else min(max(grid.low, int(floor)), grid.high)
        return low, grid.high if self.ceiling is None else max(min(grid.high, int(ceiling)), low)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        return _keep_float32(self, fn, recurse)

    def extra_repr(self) -> str:
        """Show bits, sign and granularity."""
        granularity = "per-tensor" if self.dim is None else f"per-channel dim={self.dim}"
        return f"{self.bits} bits, {'signed' if self.signed else 'unsigned'}, {granularity}"


class StoredWeight(nn.Module):
    """() -> the weight on the levels of any spec, in the dtype that the model computes in.

    codes: int8 [...], or uint8 [(n + 1) // 2] with two to a byte where they fit. clip: float32, of the shape that the
    spec says: where levels were found in the weight, those.
    """

    codes: Tensor
    clip: Tensor

    def __init__(self, weight: Tensor, clip: Tensor, spec: Spec) -> None:
        super().__init__()
        self.spec, self.shape, self.dtype = spec, tuple(weight.shape), weight.dtype
        self.is_packed = spec.format.low >= -(2 ** (PACKED - 1)) and spec.format.high < 2 ** (PACKED - 1)
        value = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        form, bound = spec.fitted(clip.detach())
        step = form.step(spec.granularity.along(bound, value).to(value.dtype))
        codes = torch.where(step > 0, form.codes(value / step), 0).to(torch.int8)
        self.register_buffer("codes", pack(codes) if self.is_packed else codes)
        self.register_buffer("clip", clip.detach().clone())

    def integers(self) -> Tensor:
        """Return the codes [...], int8."""
        return unpack(self.codes, self.shape) if self.is_packed else self.codes

    @property
    def scale(self) -> Tensor:
        """Return what one step is, of the shape of the clip."""
        form, bound = self.spec.fitted(self.clip)
        return form.step(bound)

    def forward(self) -> Tensor:
        """See the class."""
        form, bound = self.spec.fitted(self.clip)
        levels = form.levels(self.integers().to(torch.promote_types(self.dtype, torch.float32)))
        step = form.step(self.spec.granularity.along(bound, levels).to(levels.dtype))
        return representable(levels * step, self.dtype).to(self.dtype)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self.dtype = dtype_after(fn, self.dtype)
        apply_to_tensors(self, fn, recurse)
        self.clip = self.clip.to(torch.float32)
        return self

    def extra_repr(self) -> str:
        """Show the spec."""
        return str(self.spec)


class ChannelAffine(nn.Module):
    """X [N, C, ...] -> x * factor + offset [N, C, ...], both [C]: a batch norm in eval mode."""

    factor: Tensor
    offset: Tensor

    def __init__(self, factor: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor.detach())
        self.register_buffer("offset", offset.detach())

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        # One rounding for both, as in torch's own kernel on a CPU.
        return torch.addcmul(along(self.offset, x, 1), x, along(self.factor, x, 1))


class IntegerBias(nn.Module):
    """() -> the bias of a layer on the grid of its sums of codes, code * step / 2**fraction [C].

    In float32, and after a cast of the converted model in that dtype.
    codes: int32 [C]. step: float32 [C], what a sum of products of codes counts, scale of the input times scale of the
    weight. fraction: so many bits of a code are below one.
    """

    codes: Tensor
    step: Tensor

    def __init__(self, bias: Tensor, step: Tensor, fraction: int) -> None:
        super().__init__()
        self.fraction, self.dtype = fraction, torch.float32
        self.register_buffer("codes", (bias.double() * 2**fraction / step.double()).round().to(torch.int32))
        self.register_buffer("step", step)

    def forward(self) -> Tensor:
        """See the class."""
        return (self.codes.float() * (self.step / 2**self.fraction)).to(self.dtype)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self.dtype = dtype_after(fn, self.dtype)
        apply_to_tensors(self, fn, recurse)
        self.step = self.step.to(torch.float32)
        return self

    def extra_repr(self) -> str:
        """Channels and the place of the point."""
        return f"{len(self.codes)} channels, {self.fraction} bits below one"


def dtype_after(fn, dtype):  # type: ignore[no-untyped-def]
    """Return the dtype that .half() and its like make of another one."""
    return fn(torch.empty(0, dtype=dtype)).dtype


def _keep_float32(module, fn, recurse):  # type: ignore[no-untyped-def]
    """Undo what .half() would do to scales; codes are integers and stay by themselves."""
    apply_to_tensors(module, fn, recurse)
    module.scale = module.scale.to(torch.float32)
    return module
