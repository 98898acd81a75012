"""FakeQuantizer: the module that stands before one operand. Its only state is the hint."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Spec:
    """How one operand is quantized. Two operands with equal value and equal Spec share one quantizer."""

    bits: int
    signed: bool
    # The channel axis, with one clip for each of its indices; None: one clip for the tensor.
    dim: int | None
    method: str
    gradient: str


class FakeQuantizer(nn.Module):
    """x [...] -> x on the grid of its own optimal clip, [...].

    hint [] or [C] is the clip of the last call: where Newton starts, never what is used. It is not part of the
    state_dict, so a checkpoint of the float model loads with strict=True, and losing it changes no result.
    """

    hint: Tensor

    def __init__(self, spec: Spec, channels: int | None = None, device: torch.device | None = None) -> None:
        super().__init__()
        self.spec = spec
        shape = () if channels is None else (channels,)
        self.register_buffer("hint", torch.zeros(shape, dtype=torch.float32, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """X [...] -> the nearest levels of its grid [...]; the clip that was used becomes the hint."""
        spec = self.spec
        y, clip = torch.ops.octav.dynamic_fake_quantize(
            x, self.hint, spec.bits, spec.signed, spec.dim, spec.method, spec.gradient
        )
        with torch.no_grad():
            self.hint.copy_(clip)
        return y

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # .half() and .to(bfloat16) convert floating-point buffers; a clip is float32 whatever the model is.
        super()._apply(fn, recurse)
        self.hint = self.hint.to(torch.float32)
        return self

    def extra_repr(self) -> str:
        """Bits, sign, granularity, clip and gradient."""
        spec = self.spec
        granularity = "per-tensor" if spec.dim is None else f"per-channel dim={spec.dim}"
        sign = "signed" if spec.signed else "unsigned"
        return f"{spec.bits} bits, {sign}, {granularity}, {spec.method}, {spec.gradient}"
