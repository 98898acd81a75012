"""What a converted model is made of: modules of plain PyTorch ops, whose buffers are all that has to be stored."""

from typing import Final

import torch
from torch import Tensor, nn

from octav_fx.compat.modules import apply_to_tensors
from octav_fx.formats.granularity import along
from octav_fx.formats.grid import Grid
from octav_fx.formats.packing import integer_codes, pack, unpack

# Codes of so many bits are stored two to a byte.
PACKED: Final = 4
# A clip of zero sends every value to zero; so does a step that no value reaches half of.
_BEYOND: Final = 2.0**126


class IntegerWeight(nn.Module):
    """() -> the weight, scale * code [...], in the dtype that the model computes in.

    codes: int8 [...], or uint8 [(n + 1) // 2] with two to a byte for up to 4 bits. scale: float32 [] or, with the
    channel axis dim, [C]. The same values that the frozen fake-quantizer computes from the float weight.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, clip: Tensor, bits: int, dim: int | None) -> None:
        super().__init__()
        self.bits, self.dim, self.shape, self.dtype = bits, dim, tuple(weight.shape), weight.dtype
        grid = Grid(bits, signed=True)
        codes = integer_codes(weight.detach(), clip, grid, dim)
        self.register_buffer("codes", pack(codes) if bits <= PACKED else codes.contiguous())
        self.register_buffer("scale", grid.step(clip.detach()).clone())

    def integers(self) -> Tensor:
        """Return the codes [...], int8."""
        return unpack(self.codes, self.shape) if self.bits <= PACKED else self.codes

    def forward(self) -> Tensor:
        """See the class."""
        codes = self.integers().to(torch.promote_types(self.dtype, torch.float32))
        return (codes * along(self.scale, codes, self.dim).to(codes.dtype)).to(self.dtype)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        return _keep_float32(self, fn, recurse)

    def extra_repr(self) -> str:
        """Show bits, shape and granularity."""
        return f"{self.bits} bits, {self.shape}, {'per-tensor' if self.dim is None else f'per-channel dim={self.dim}'}"


class StaticQuantizer(nn.Module):
    """X [...] -> the nearest level, scale * code [...], ties to the even code.

    scale: float32 [] or [C]. What ops/fake_quantize computes of finite values; inf saturates here.
    """

    scale: Tensor

    def __init__(self, clip: Tensor, bits: int, signed: bool, dim: int | None) -> None:
        super().__init__()
        self.bits, self.signed, self.dim = bits, signed, dim
        step = Grid(bits, signed).step(clip.detach())
        self.register_buffer("scale", torch.where(step > 0, step, _BEYOND))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        grid = Grid(self.bits, self.signed)
        value = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = along(self.scale, x, self.dim).to(value.dtype)
        return ((value / scale).round().clamp(grid.low, grid.high) * scale).to(x.dtype)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        return _keep_float32(self, fn, recurse)

    def extra_repr(self) -> str:
        """Show bits, sign and granularity."""
        granularity = "per-tensor" if self.dim is None else f"per-channel dim={self.dim}"
        return f"{self.bits} bits, {'signed' if self.signed else 'unsigned'}, {granularity}"


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


def _keep_float32(module, fn, recurse):  # type: ignore[no-untyped-def]
    """Undo what .half() would do to scales; codes are integers and stay by themselves."""
    apply_to_tensors(module, fn, recurse)
    module.scale = module.scale.to(torch.float32)
    return module
