"""Granularity: which elements share a clip. One of the tensor, of each channel, of each token, of each group."""

import re
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Granularity:
    """Which elements of a tensor share a clip.

    "tensor": all. "channel": those with the same index along the axis. "token": the elements along the axis, which
    is the one that a matmul sums over, for each index of the others. "group": so many neighbours along that axis.

    A clip is [], [C], or of the shape of the tensor with K along the axis replaced by 1 or K / size.
    """

    kind: str
    # Counted from the front, that of channels from the back, too; None: there is none.
    axis: int | None = None
    size: int | None = None

    def __str__(self) -> str:
        """Return how specs spell it: "tensor", "channel.0", "token.2", "group-32.1"."""
        size = "" if self.size is None else f"-{self.size}"
        return self.kind + size + ("" if self.axis is None else f".{self.axis}")

    @property
    def label(self) -> str:
        """Return how tables name it: "tensor", "channel 0", "token 2", "group-32 1"."""
        return str(self).replace(".", " ")

    @property
    def is_short(self) -> bool:
        """Tell whether a clip belongs to a row along the reduction axis: there are many, of few elements each."""
        return self.kind in ("token", "group")

    @property
    def channel(self) -> int | None:
        """Return the channel axis; None if there is one clip for the tensor."""
        assert not self.is_short
        return self.axis

    def rows(self, x: Tensor) -> Tensor:
        """Reshape x [...] to [R, N]: one clip belongs to each row."""
        if self.axis is None or not self.is_short:
            return to_rows(x, self.axis)
        last = x.movedim(self.axis, -1)
        size = last.shape[-1] if self.size is None else self.size
        return last.reshape(last.shape[:-1].numel() * (last.shape[-1] // size if size else 1), size)

    def of_rows(self, clips: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Give the clips of rows [R] the shape of the clip of x [shape]."""
        if self.axis is None or not self.is_short:
            return clips.reshape(self.clip_shape(shape))
        moved = [*shape[: self.axis], *shape[self.axis + 1 :], self.clip_shape(shape)[self.axis]]
        return clips.reshape(moved).movedim(-1, self.axis)

    def clip_shape(self, shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
        """Return the shape of the clip of x [shape]."""
        if self.axis is None:
            return ()
        if not self.is_short:
            return (shape[self.axis],)
        count = 1 if self.size is None else shape[self.axis] // self.size
        return (*shape[: self.axis], count, *shape[self.axis + 1 :])

    def along(self, clip: Tensor, x: Tensor) -> Tensor:
        """Reshape a clip so that it broadcasts against x."""
        if self.axis is None or not self.is_short:
            return along(clip, x, self.axis)
        return clip if self.size is None else clip.repeat_interleave(self.size, self.axis)

    def divides(self, shape: tuple[int, ...] | torch.Size) -> bool:
        """Tell whether groups come out even in a tensor of this shape."""
        return self.axis is None or self.size is None or shape[self.axis] % self.size == 0


TENSOR: Final = Granularity("tensor")
_SPELLING: Final = re.compile(r"(tensor|channel|token|group)(?:-([1-9][0-9]*))?(?:\.(-?[0-9]+))?")


def granularity(name: str) -> Granularity:
    """Return the Granularity that a name spells, with or without its axis. Raises ValueError for any other text."""
    found = _SPELLING.fullmatch(name)
    if found is None or (found[1] == "group") != (found[2] is not None):
        raise ValueError(f"{name!r}: tensor, channel, token, or group- and a number")
    size, axis = (None if number is None else int(number) for number in (found[2], found[3]))
    return Granularity(found[1], axis, size)


def to_rows(x: Tensor, dim: int | None) -> Tensor:
    """Reshape x [...] to [1, N], or with the channel axis dim to [C, N]. One clip belongs to each row."""
    return x.reshape(1, -1) if dim is None else x.movedim(dim, 0).flatten(1) if x.dim() > 1 else x.reshape(-1, 1)


def along(clip: Tensor, x: Tensor, dim: int | None) -> Tensor:
    """Reshape a clip [C] to [1, .., C, .., 1], so that it broadcasts against x along the channel axis; [] stays []."""
    if dim is None:
        return clip
    shape = [1] * x.dim()
    shape[dim] = -1
    return clip.reshape(shape)


def clip_shape(x: Tensor, dim: int | None) -> tuple[int, ...]:
    """Return the shape of the clip of x: () per tensor, (C,) per channel."""
    return () if dim is None else (x.shape[dim],)
