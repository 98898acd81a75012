"""How near a pass over a tensor comes to a copy: the milliseconds in which a copy moves as many bytes, over its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import median_ms
from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import integers
from octav_fx.ops.optimal_clip.op import optimal_clip

SIZES = tuple(2**power for power in (20, 22, 24, 26, 28))
TINY = (2**10,)
# bits, signed: an activation after a relu, and one before.
GRIDS = ((4, False), (4, True), (8, True))


@dataclass(frozen=True, slots=True)
class Activation:
    """A tensor in bfloat16, its optimal clip, its codes, and memory for a result."""

    x: Tensor
    clip: Tensor
    bits: int
    signed: bool
    codes: Tensor
    out: Tensor

    @property
    def code_bytes(self) -> int:
        """Bytes of a code."""
        return self.codes.element_size()


def activations(device: str) -> Iterator[tuple[Activation, float]]:
    """Every size and grid, and the bytes that a copy of that size reads and writes in a millisecond."""
    for elements in SIZES if device == "cuda" else TINY:
        source = torch.randn(elements, device=device).to(torch.bfloat16)
        out = torch.empty_like(source)
        copy = 2 * source.nbytes / median_ms(lambda: out.copy_(source), device)  # noqa: B023  run at once
        for bits, signed in GRIDS:
            x = source if signed else source.relu()
            clip = optimal_clip(x, torch.zeros((), device=device), integers(bits, signed, None), "octav")
            codes = torch.empty_like(x, dtype=Grid(bits, signed).codes_dtype)
            yield Activation(x, clip, bits, signed, codes, out), copy


def row(name: str, run: Callable[[], Any], of: Activation, width: int, copy: float, device: str) -> dict[str, Any]:
    """One result. width: the bytes for each element that the op cannot do without; copy: bytes in a millisecond."""
    ms, floor = median_ms(run, device), width * of.x.numel() / copy
    return {
        "op": name,
        "elements": of.x.numel(),
        "bits": of.bits,
        "signed": of.signed,
        "bytes": width,
        "copy_tb": round(1e-9 * copy, 3),
        "ms": round(ms, 5),
        "attained": round(floor / ms, 3),
    }
