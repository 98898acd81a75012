"""The values that a report shows, as plain JSON values."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from octav_fx.capture.modules import quantized_modules
from octav_fx.capture.partial import outermost
from octav_fx.clips.learned import LEARNED
from octav_fx.formats.granularity import TENSOR, Granularity
from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import Spec
from octav_fx.ir.records import graph_info
from octav_fx.nn import FakeQuantizer
from octav_fx.reporting.blocks import block_of
from octav_fx.reporting.measure import measured, sqnr_of
from octav_fx.reporting.report.layout import drawn
from octav_fx.reporting.rows import Row, coverage, finite, records_of, rows
from octav_fx.reporting.table import format_name, notes_of

# At how many bits the error of each operand is predicted.
BITS: Final = (2, 3, 4, 5, 6, 7, 8)
_BINS: Final = 96
# Most values of an operand that a prediction looks at.
_SAMPLE: Final = 1 << 18
# More lines than this are a grey area in a histogram.
_MOST_LEVELS: Final = 33


@dataclass(frozen=True, slots=True)
class Detail:
    """What one quantizer did: counts between edges, clip and levels in the same units, predictions by bits."""

    # "x", or "x / clip" where each channel has its clip.
    unit: str
    low: float
    high: float
    counts: list[int]
    clip: float
    levels: list[float]
    predicted: dict[int, float | None]


def collected(q: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Return what a report shows of a quantized model."""
    quantized = outermost(q)
    details = measured(quantized, example_inputs, detail_of)
    found = rows(q, example_inputs)
    by_row = []
    for row, (part, record) in zip(found, records_of(quantized), strict=True):
        quantizer = None if part is None or record.quantizer is None else part.get_submodule(record.quantizer)
        by_row.append(_row(row, details.get(quantizer) if quantizer is not None else None))
    covered = coverage(q)
    parts = quantized_modules(quantized)
    return {
        "model": type(quantized).__name__,
        "rows": by_row,
        "bits": list(BITS),
        "quantized_macs": covered.quantized_macs,
        "total_macs": covered.total_macs,
        "skipped": [{"node": node, "reason": reason, "macs": macs} for node, reason, macs in covered.skipped],
        "notes": notes_of(quantized),
        "config": dict(graph_info(parts[0]).config),
        "graph": drawn(parts, {module: name for name, module in quantized.named_modules()}),
    }


def detail_of(quantizer: FakeQuantizer, x: Tensor, y: Tensor) -> Detail:
    """Count the values of x [...] by size, and predict the error of other bits."""
    spec = quantizer.spec
    form, clip = spec.fitted(quantizer.clip_of(x))
    bound = spec.granularity.along(clip, x).to(torch.float32)
    is_shared = spec.granularity.axis is None
    values = x.detach().to(torch.float32)
    if not is_shared:
        values = torch.where(bound > 0, values / bound, 0)
    values = values[values.isfinite()]
    low, high = (float(values.min()), float(values.max())) if values.numel() else (0.0, 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(values, _BINS, low, high).long().tolist()
    limit = float(clip) if is_shared and clip.numel() else 1.0
    codes = torch.arange(form.low, form.high + 1, dtype=torch.float64)
    levels = (form.levels(codes) * limit / form.steps).tolist()
    return Detail(
        unit="x" if is_shared else "x / clip",
        low=low,
        high=high,
        counts=counts,
        clip=limit,
        levels=levels if len(levels) <= _MOST_LEVELS else [levels[0], levels[-1]],
        predicted=_predicted(quantizer, x),
    )


def _predicted(quantizer: FakeQuantizer, x: Tensor) -> dict[int, float | None]:
    """Return the SQNR in dB at BITS with the best clip for each, on a sample of x [...]; None where it is exact."""
    settings, shared = quantizer.settings, quantizer.spec.granularity
    _, hint = quantizer.spec.fitted(quantizer.used)
    sample = shared.rows(x.detach())
    every = max(1, math.ceil(sample.numel() / _SAMPLE))
    sample = sample[::every] if shared.is_short else sample[:, ::every]
    # A learned clip is of its own bits: what others would learn, nobody knows.
    method = "octav" if settings.method in LEARNED else settings.method
    sample = sample if shared.axis is not None else sample.reshape(-1)
    of_sample = (
        Granularity("token", 1) if shared.is_short else Granularity("channel", 0) if shared.axis is not None else TENSOR
    )
    found: dict[int, float | None] = {}
    for bits in BITS:
        spec = str(Spec(Grid(bits, quantizer.spec.format.signed), of_sample))
        clip = torch.ops.octav.optimal_clip(sample, hint, spec, method)
        rounded = torch.ops.octav.fake_quantize(sample, clip, spec, "ste")
        found[bits] = finite(sqnr_of(sample, rounded))
    return found


def _row(row: Row, detail: Detail | None) -> dict[str, Any]:
    count = math.prod(row.shape)
    return {
        **{name: finite(value) for name, value in dataclasses.asdict(row).items()},
        "exact": row.sqnr == math.inf,
        "format": format_name(row),
        "block": block_of(row.node),
        # Of a weight as it is stored: codes and scales.
        "float_bytes": 4 * count if row.operand == "weight" else None,
        "bytes": math.ceil(count * (row.bits_per_element or 32) / 8) if row.operand == "weight" else None,
        "detail": None if detail is None else _rounded(dataclasses.asdict(detail)),
    }


def _rounded(value: Any) -> Any:
    """Return nested values with floats of six digits: the file is read by people and browsers."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
