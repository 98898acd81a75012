"""What quantizers do to their tensors in one forward."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from octav_fx.capture.inputs import as_inputs
from octav_fx.capture.partial import example_of
from octav_fx.capture.rerun import has_data, run_once
from octav_fx.nn import FakeQuantizer

T = TypeVar("T")


def measured(
    q: nn.Module, example_inputs: Any, measure: Callable[[FakeQuantizer, Tensor, Tensor], T]
) -> dict[nn.Module, T]:
    """Return measure(quantizer, input, output) by quantizer, from one forward; none where there is nothing to run on.

    example_inputs: None for those that quantize() was given.
    """
    call = example_of(q) if example_inputs is None else as_inputs(example_inputs)
    if call is None or not has_data(q, call):
        return {}
    found: dict[nn.Module, T] = {}

    def record(m: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        assert isinstance(m, FakeQuantizer)
        found[m] = measure(m, args[0], y)

    handles = [m.register_forward_hook(record) for m in q.modules() if isinstance(m, FakeQuantizer)]
    try:
        run_once(q, *call)
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass(frozen=True, slots=True)
class Statistics:
    """The fields of a Row that depend on values."""

    clip: Tensor
    max_abs: float
    clipped: float
    zeros: float
    sqnr: float
    gain: float


def statistics_of(quantizer: FakeQuantizer, x: Tensor, y: Tensor) -> Statistics:
    """Measure what a quantizer made of x [...], y [...]; values that are not finite are left out."""
    spec, found = quantizer.spec, quantizer.clip_of(x)
    _, clip = spec.fitted(found)
    finite = x.isfinite()
    bound = spec.granularity.along(clip, x)
    beyond = (x.abs() > bound) | (x < 0 if not spec.format.signed else False)
    largest = torch.ops.octav.optimal_clip(x, found, str(spec), "max")
    by_largest = torch.ops.octav.fake_quantize(x, largest, str(spec), "ste")
    sqnr, of_largest = sqnr_of(x, y), sqnr_of(x, by_largest)
    return Statistics(
        clip=clip.detach().clone(),
        max_abs=float(torch.where(finite, x.abs(), 0).max()) if x.numel() else 0.0,
        clipped=_share(beyond & finite),
        zeros=_share(y == 0),
        sqnr=sqnr,
        gain=0.0 if sqnr == of_largest else sqnr - of_largest,
    )


def sqnr_of(x: Tensor, rounded: Tensor) -> float:
    """Return the signal to quantization noise of the finite values of x [...], in dB; inf where there is no noise."""
    finite = x.isfinite()
    signal, noise = _power(x, finite), _power(x - rounded, finite)
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _power(x: Tensor, finite: Tensor) -> float:
    return float(torch.where(finite, x, 0).double().square().sum())


def _share(mask: Tensor) -> float:
    return float(mask.float().mean()) if mask.numel() else 0.0
