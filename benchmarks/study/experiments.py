"""What is done to the clips that a method found, to learn why a net trains with them as it does.

Each experiment could refute an explanation: that clips jump from step to step, that what is clipped are the values that
matter, of the weights or of the activations, or that an error should count as much as the loss depends on it.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import integers
from octav_fx.nn import FakeQuantizer

# A quantizer, its finite rows [R, N] and the clips that were found [R] -> the clips that are used [R].
Change = Callable[[FakeQuantizer, Tensor, Tensor], Tensor]

# How far one step moves what is smoothed.
_SMOOTHING: Final = 0.05
_JITTER: Final = 0.1
# Of a clip near 1: a change of a hundred-thousandth turns the sine.
_LAST_DIGITS: Final = 1e5


def apply(model: nn.Module, experiment: str) -> None:
    """Change the quantizers of a quantized model as a row of EXPERIMENTS says."""
    of_weights, of_activations = EXPERIMENTS[experiment]
    for quantizer in model.modules():
        if isinstance(quantizer, FakeQuantizer):
            change = of_activations if quantizer.running else of_weights
            if change is not None:
                install(quantizer, change)


def install(quantizer: FakeQuantizer, change: Change) -> None:
    """Let a quantizer use other clips than it finds."""
    spec = quantizer.spec
    # What smoothed() keeps: a part of the state, so that a run goes on where it was.
    quantizer.register_buffer("smooth", torch.zeros(quantizer.hint.numel()))

    def forward(x: Tensor) -> Tensor:
        found = torch.ops.octav.optimal_clip(x.detach(), quantizer.hint, str(spec), quantizer.settings.method)
        used = change(quantizer, spec.granularity.rows(x.detach()), found.flatten())
        used = spec.granularity.of_rows(used, x.shape)
        return torch.ops.octav.fake_quantize(x, used, str(spec), quantizer.settings.gradient)

    quantizer.forward = forward  # type: ignore[method-assign]


def by(method: str, fewer: int = 0) -> Change:
    """Return the change to the clips of a method for so many bits less; "octav" is eq. 6 without the search."""

    def change(quantizer: FakeQuantizer, rows: Tensor, clips: Tensor) -> Tensor:
        grid = quantizer.spec.format
        assert isinstance(grid, Grid)
        spec = integers(grid.bits - fewer, grid.signed, 0)
        return torch.ops.octav.optimal_clip(rows, torch.zeros_like(clips), spec, method)

    return change


def smoothed(quantizer: FakeQuantizer, rows: Tensor, clips: Tensor) -> Tensor:
    """Return the running mean of the clips, which training moves."""
    mean = quantizer.get_buffer("smooth")
    if quantizer.training:
        mean.lerp_(clips, _SMOOTHING if mean.any() else 1.0)
    return mean.clone()


def jittered(quantizer: FakeQuantizer, rows: Tensor, clips: Tensor) -> Tensor:
    """Return each clip times 1 +- 0.1, by its last digits.

    The standard deviation is 0.07: that of "octav" over the largest magnitude, in groups of 32 normal values.
    """
    return clips * (1 + _JITTER * torch.sin(clips * _LAST_DIGITS))


def times(share: float) -> Change:
    """Return the change to a share of each clip."""
    return lambda quantizer, rows, clips: clips * share


_TIGHT: Final = by("octav-tight")
EXPERIMENTS: Final[dict[str, tuple[Change | None, Change | None]]] = {
    "max-weights": (by("max"), None),
    "max-activations": (None, by("max")),
    "tight-weights": (_TIGHT, None),
    "tight-activations": (None, _TIGHT),
    # Of one bit less than those of "octav-tight": rounding counts sixteen times what clipping does.
    "tighter": (by("octav", fewer=2), by("octav", fewer=2)),
    "recursion": (by("octav"), by("octav")),
    "smoothed-weights": (smoothed, None),
    "jittered": (jittered, jittered),
    **{f"{share}-weights": (times(share), None) for share in (0.8, 0.9, 1.1, 1.25)},
    **{f"{share}-activations": (None, times(share)) for share in (0.8, 0.9, 1.1, 1.25)},
}
