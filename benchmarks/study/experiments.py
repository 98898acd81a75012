"""What is done to the clips that a method found, to learn why a net trains with them as it does.

Each experiment could refute an explanation: that clips jump from step to step, that what is clipped are the values that
matter, of the weights or of the activations, or that an error should count as much as the loss depends on it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from octav_fx.formats.format import Format
from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import Spec, integers
from octav_fx.nn import FakeQuantizer

# A quantizer, its operand x [...] and the clips that were found, one for each row, [R] -> the clips that are used [R].
Change = Callable[[FakeQuantizer, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Experiment:
    """Other clips than those that a method finds."""

    weights: Change | None = None
    activations: Change | None = None
    # "clipped": with so many levels that rounding does not count. "rounded": with the same step, and so many levels
    # that nothing is clipped.
    only: str = ""


# How far one step moves what is smoothed.
_SMOOTHING: Final = 0.05
_JITTER: Final = 0.1
# Of a clip near 1: a change of a hundred-thousandth turns the sine.
_LAST_DIGITS: Final = 1e5
_MANY_BITS: Final = 8
_TINY: Final = 1e-30
# The steps of search_weighted(), which clip up to two thirds; they lie closer where less is clipped.
_SHARES: Final = tuple(0.35 ** ((i / 16) ** 1.5) for i in range(17))


def apply(model: nn.Module, name: str) -> None:
    """Change the quantizers of a quantized model as a row of EXPERIMENTS says; not those of many bits."""
    experiment = EXPERIMENTS[name]
    for quantizer in model.modules():
        if isinstance(quantizer, FakeQuantizer) and quantizer.spec.format.bits < _MANY_BITS:
            change = experiment.activations if quantizer.running else experiment.weights
            if change is not None or experiment.only:
                install(quantizer, change or _as_found, experiment.only)


def install(quantizer: FakeQuantizer, change: Change, only: str = "") -> None:
    """Let a quantizer use other clips than it finds."""
    granularity, grid = quantizer.spec.granularity, quantizer.spec.format
    assert isinstance(grid, Grid)
    fine = Grid(_MANY_BITS, grid.signed)
    used = str(Spec(fine, granularity) if only else quantizer.spec)
    # With this many clips the step is as before, and the clip far outside.
    wider = fine.steps / grid.steps if only == "rounded" else 1.0
    # What smoothed() and weighted() keep: a part of the state, so that a run goes on where it was.
    quantizer.register_buffer("smooth", torch.zeros(quantizer.hint.numel()))
    quantizer.register_buffer("squares", torch.zeros(quantizer.hint.numel(), granularity.size or 0))

    def forward(x: Tensor) -> Tensor:
        found = torch.ops.octav.optimal_clip(x.detach(), quantizer.hint, str(quantizer.spec), quantizer.settings.method)
        clips = change(quantizer, x, found.flatten()) * wider
        return torch.ops.octav.fake_quantize(x, granularity.of_rows(clips, x.shape), used, quantizer.settings.gradient)

    quantizer.forward = forward  # type: ignore[method-assign]


def _as_found(quantizer: FakeQuantizer, x: Tensor, clips: Tensor) -> Tensor:
    return clips


def by(method: str) -> Change:
    """Return the change to the clips of a method; "octav" is eq. 6 without the search."""

    def change(quantizer: FakeQuantizer, x: Tensor, clips: Tensor) -> Tensor:
        grid = quantizer.spec.format
        assert isinstance(grid, Grid)
        spec = integers(grid.bits, grid.signed, 0)
        rows = quantizer.spec.granularity.rows(x.detach())
        return torch.ops.octav.optimal_clip(rows, torch.zeros_like(clips), spec, method)

    return change


def smoothed(quantizer: FakeQuantizer, x: Tensor, clips: Tensor) -> Tensor:
    """Return the running mean of the clips, which training moves."""
    mean = quantizer.get_buffer("smooth")
    if quantizer.training:
        mean.lerp_(clips, _SMOOTHING if mean.any() else 1.0)
    return mean.clone()


def weighted(quantizer: FakeQuantizer, x: Tensor, clips: Tensor) -> Tensor:
    """Return the clips of groups of weights for which an error counts as much as the mean square of its gradient."""
    rows_of, squares = quantizer.spec.granularity.rows, quantizer.get_buffer("squares")

    def note(gradient: Tensor) -> None:
        squares.lerp_(rows_of(gradient).square(), _SMOOTHING if squares.any() else 1.0)

    if x.requires_grad and not x._backward_hooks:
        x.register_hook(note)
    return search_weighted(rows_of(x.detach()), squares, quantizer.spec.format) if squares.any() else clips


def search_weighted(rows: Tensor, weights: Tensor, form: Format) -> Tensor:
    """Return the clips [R] of rows [R, N], of shares of what clips nothing, with the least weighted error."""
    whole = torch.maximum(rows.amax(-1) / form.greatest, rows.amin(-1) / form.least).clamp(min=_TINY)
    steps = torch.stack([whole * share for share in _SHARES])
    errors = [(form.round(rows / step) * step - rows).square().mul(weights).sum(-1) for step in steps.unsqueeze(-1)]
    return steps.gather(0, torch.stack(errors).argmin(0, keepdim=True)).squeeze(0) * form.steps


def jittered(quantizer: FakeQuantizer, x: Tensor, clips: Tensor) -> Tensor:
    """Return each clip times 1 +- 0.1, by its last digits.

    The standard deviation is 0.07: that of "octav" over the largest magnitude, in groups of 32 normal values.
    """
    return clips * (1 + _JITTER * torch.sin(clips * _LAST_DIGITS))


def times(share: float) -> Change:
    """Return the change to a share of each clip."""
    return lambda quantizer, x, clips: clips * share


_MAX, _TIGHT, _RECURSION = by("max"), by("octav-tight"), by("octav")
EXPERIMENTS: Final[dict[str, Experiment]] = {
    "max-weights": Experiment(weights=_MAX),
    "max-activations": Experiment(activations=_MAX),
    "tight-weights": Experiment(weights=_TIGHT),
    "tight-activations": Experiment(activations=_TIGHT),
    "recursion": Experiment(_RECURSION, _RECURSION),
    "smoothed-weights": Experiment(weights=smoothed),
    "weighted-weights": Experiment(weights=weighted),
    "jittered": Experiment(jittered, jittered),
    **{f"times-{share}": Experiment(times(share), times(share)) for share in (0.9, 1.1)},
    "clipped": Experiment(only="clipped"),
    "rounded": Experiment(only="rounded"),
}
