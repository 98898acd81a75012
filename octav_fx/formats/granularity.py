"""Per-tensor and per-channel: one clip for the tensor, or one for each index of the channel axis."""

from torch import Tensor


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
