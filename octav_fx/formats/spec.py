"""Spec: format x granularity x scale format. It travels as one thing; ops take it as text, since schemas have no other.

"int4/tensor"    "uint8/tensor"    "int4/channel.0"    "int8/token.2"    "int4/group-32.1"    "e2m1/group-16.1/e4m3"
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octav_fx.formats.format import Format
from octav_fx.formats.granularity import TENSOR, Granularity, granularity
from octav_fx.formats.grid import Grid
from octav_fx.formats.kmeans import KMeans
from octav_fx.formats.registry import format_of
from octav_fx.formats.scales import SCALE_BITS, SCALES


@dataclass(frozen=True, slots=True)
class Spec:
    """How the numbers of one operand are represented."""

    format: Format
    granularity: Granularity = TENSOR
    # What a scale is rounded to before codes are chosen: a name of formats/scales.py.
    scale: str = "float32"

    def __str__(self) -> str:
        """Return the text that spec_of() reads."""
        parts = [self.format.name, str(self.granularity), *([] if self.scale == "float32" else [self.scale])]
        return "/".join(parts)

    def bits_per_element(self, shape: tuple[int, ...]) -> float:
        """Return the bits that an element of a tensor of this shape takes, its share of the scales counted."""
        count, clips = math.prod(shape), math.prod(self.clip_shape(shape))
        shared = 32 if self.scale == "e4m3" else 0
        return (
            self.format.bits + (clips * SCALE_BITS[self.scale] + shared) / count if count else float(self.format.bits)
        )

    def clip_shape(self, shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
        """Return the shape of the clip of x [shape]; where levels are found in the tensor, they are the clip."""
        return (2**self.format.bits,) if isinstance(self.format, KMeans) else self.granularity.clip_shape(shape)

    def of_rows(self, clips: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Give the clips of rows [R], or the levels of the one row, the shape of the clip of x [shape]."""
        return clips if isinstance(self.format, KMeans) else self.granularity.of_rows(clips, shape)

    def fitted(self, clip: Tensor) -> tuple[Format, Tensor]:
        """Return the format with its levels, and the clip of a granularity, of what clip_shape says."""
        return self.format.fitted(clip) if isinstance(self.format, KMeans) else (self.format, clip)

    @property
    def even(self) -> tuple[Grid, int | None] | None:
        """Return the grid and the channel axis of integers with one clip, or one for each channel; else None."""
        if not isinstance(self.format, Grid) or self.granularity.is_short:
            return None
        return self.format, self.granularity.channel

    @property
    def plain(self) -> tuple[Grid, int | None] | None:
        """Return the grid and the channel axis where the clip of the tensor or of each channel is all there is to know.

        None for any other spec: the kernels that are made for these leave it to the reference.
        """
        return self.even if self.scale == "float32" else None


@functools.cache
def spec_of(text: str) -> Spec:
    """Return the Spec that a text spells. Raises ValueError for any other text."""
    form, shared, *scale = text.split("/")
    found = Spec(format_of(form), granularity(shared), *scale)
    if found.scale not in SCALES:
        raise ValueError(f"{found.scale!r}: one of {', '.join(SCALES)}")
    if isinstance(found.format, KMeans) and (found.granularity != TENSOR or found.scale != "float32"):
        raise ValueError(f"{text!r}: {form} has float32 levels for the tensor")
    return found


def integers(bits: int, signed: bool, dim: int | None = None) -> str:
    """Return the text of the spec of an integer grid with one clip, or with one for each index of the channel axis."""
    return f"{'int' if signed else 'uint'}{bits}/{'tensor' if dim is None else f'channel.{dim}'}"
