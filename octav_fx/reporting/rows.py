"""What became of each operand: rows, the printed table, and the share of the multiply-accumulates that is quantized."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from octav_fx.capture.inputs import as_inputs
from octav_fx.capture.modules import QuantizedModule, graphs_of, quantized_modules
from octav_fx.capture.partial import example_of, float_records, outermost, partial_lines
from octav_fx.capture.rerun import has_data, run_once
from octav_fx.formats.granularity import along
from octav_fx.formats.grid import Grid
from octav_fx.ir.records import Record, graph_info
from octav_fx.nn import FakeQuantizer


@dataclass(frozen=True, slots=True)
class Row:
    """One operand. Statistics are of one forward on the example inputs, None where nothing was or could be run."""

    node: str
    op: str
    operand: str
    shape: tuple[int, ...]
    # None where the operand stays float; then reason says why.
    bits: int | None
    signed: bool | None
    # "tensor", or "channel" with the axis.
    granularity: str | None
    # Mean, least and greatest clip over the channels, in the units of the operand.
    clip: float | None
    clip_min: float | None
    clip_max: float | None
    max_abs: float | None
    # Shares of the elements: beyond the clip, and rounded to zero (zeros among them).
    clipped: float | None
    zeros: float | None
    # Signal to quantization noise, and by how much that is better than with the largest magnitude as clip; in dB.
    sqnr: float | None
    gain: float | None
    # Multiply-accumulates of the node and their share of the model's; the same in each row of a node.
    macs: int
    share: float
    # The module whose graph holds the node, "" for the whole model; None where no graph does.
    graph: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Coverage:
    """Multiply-accumulates of the example inputs. skipped: (node, reason, macs) for each node not wholly quantized."""

    quantized_macs: int
    total_macs: int
    skipped: list[tuple[str, str, int]]


@dataclass(frozen=True, slots=True)
class _Statistics:
    clip: Tensor
    max_abs: float
    clipped: float
    zeros: float
    sqnr: float
    gain: float


def rows(q: nn.Module, example_inputs: Any = None) -> list[Row]:
    """Return a Row for each operand of each matmul and convolution, and one for each node that no rule covers.

    Measures one forward in q's mode on example_inputs, by default those given to quantize(); parameters, statistics
    and random states stay as they are.
    """
    quantized = outermost(q)
    statistics = _measure(quantized, example_inputs)
    found = _records(quantized)
    total = _total([record for _, record in found])
    names = {graphs_of(module): name for name, module in quantized.named_modules()}
    return [_row(part, record, statistics, total, names) for part, record in found]


def coverage(q: nn.Module) -> Coverage:
    """Count how much of the model's work is quantized, and say what is not."""
    nodes: dict[str, list[Record]] = {}
    for _, record in _records(outermost(q)):
        nodes.setdefault(record.site, []).append(record)
    skipped = []
    quantized = total = 0
    for site, found in nodes.items():
        total += found[0].macs
        reasons = [f"{r.operand}: {r.reason}" if r.operand else str(r.reason) for r in found if r.quantizer is None]
        if reasons:
            skipped.append((site, "; ".join(reasons), found[0].macs))
        else:
            quantized += found[0].macs
    return Coverage(quantized, total, skipped)


def table(q: nn.Module, example_inputs: Any = None) -> str:
    """Return rows() as text, with the coverage and what passes declined below."""
    headers: tuple[str, ...] = (
        *(
            "node",
            "op",
            "operand",
            "shape",
            "bits",
            "signed",
            "granularity",
            "clip",
            "clip range",
            "max|x|",
            "clipped %",
        ),
        *("zeros %", "SQNR dB", "gain dB", "MACs", "MACs %", "graph", "reason"),
    )
    lines: list[tuple[str, ...]] = [_cells(row) for row in rows(q, example_inputs)]
    # Empty for most models: one graph holds all of it, and nothing stays float.
    used = [
        i for i, header in enumerate(headers) if header not in ("graph", "reason") or any(line[i] for line in lines)
    ]
    headers, lines = tuple(headers[i] for i in used), [tuple(line[i] for i in used) for line in lines]
    text = tabulate(lines, headers, disable_numparse=True, colalign=_alignment(headers) if lines else None)
    covered = coverage(q)
    share = covered.quantized_macs / covered.total_macs if covered.total_macs else 0.0
    text += f"\n\nquantized: {share:.2%} of {_si(covered.total_macs)} MACs"
    if covered.skipped:
        text += f"; {len(covered.skipped)} nodes keep float operands"
    quantized = outermost(q)
    own = [note for part in quantized_modules(quantized) for note in graph_info(part).notes]
    return "\n".join([text, *partial_lines(quantized), *dict.fromkeys(own)])


def _records(quantized: nn.Module) -> list[tuple[QuantizedModule | None, Record]]:
    """Return each record and the graph it is of; None for what no graph holds."""
    found = [(part, record) for part in quantized_modules(quantized) for record in part.records]
    return [*found, *((None, record) for record in float_records(quantized))]


def _total(found: list[Record]) -> int:
    return sum({record.site: record.macs for record in found}.values())


def _measure(q: nn.Module, example_inputs: Any) -> dict[nn.Module, _Statistics]:
    """Return statistics by quantizer, from one forward; none where there is nothing to run on."""
    call = example_of(q) if example_inputs is None else as_inputs(example_inputs)
    if call is None or not has_data(q, call):
        return {}
    found: dict[nn.Module, _Statistics] = {}

    def record(m: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        assert isinstance(m, FakeQuantizer)
        found[m] = _statistics(m, args[0], y)

    handles = [m.register_forward_hook(record) for m in q.modules() if isinstance(m, FakeQuantizer)]
    try:
        run_once(q, *call)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _statistics(quantizer: FakeQuantizer, x: Tensor, y: Tensor) -> _Statistics:
    spec, clip = quantizer.spec, quantizer.used
    finite = x.isfinite()
    grid = Grid(spec.bits, spec.signed)
    bound = along(clip, x, spec.dim)
    beyond = (x.abs() > bound) | (x < 0 if not spec.signed else False)
    largest = torch.ops.octav.optimal_clip(x, clip, spec.bits, spec.signed, spec.dim, "max")
    by_largest = torch.ops.octav.fake_quantize(x, largest, grid.bits, spec.signed, spec.dim, "ste")
    signal = _power(x, finite)
    sqnr, of_largest = (_decibel(signal, _power(x - rounded, finite)) for rounded in (y, by_largest))
    return _Statistics(
        clip=clip.detach().clone(),
        max_abs=float(torch.where(finite, x.abs(), 0).max()) if x.numel() else 0.0,
        clipped=_share(beyond & finite),
        zeros=_share(y == 0),
        sqnr=sqnr,
        gain=0.0 if sqnr == of_largest else sqnr - of_largest,
    )


def _power(x: Tensor, finite: Tensor) -> float:
    return float(torch.where(finite, x, 0).double().square().sum())


def _share(mask: Tensor) -> float:
    return float(mask.float().mean()) if mask.numel() else 0.0


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _row(
    part: QuantizedModule | None,
    record: Record,
    statistics: Mapping[nn.Module, _Statistics],
    total: int,
    names: Mapping[QuantizedModule | None, str],
) -> Row:
    spec = measured = None
    if part is not None and record.quantizer is not None:
        quantizer = part.get_submodule(record.quantizer)
        assert isinstance(quantizer, FakeQuantizer)
        spec, measured = quantizer.spec, statistics.get(quantizer)
    clip = measured.clip if measured is not None and measured.clip.numel() else None
    return Row(
        node=record.site,
        op=record.op,
        operand=record.operand or "",
        shape=record.shape,
        bits=spec.bits if spec else None,
        signed=spec.signed if spec else None,
        granularity=None if spec is None else "tensor" if spec.dim is None else f"channel {spec.dim}",
        clip=None if clip is None else float(clip.mean()),
        clip_min=None if clip is None else float(clip.min()),
        clip_max=None if clip is None else float(clip.max()),
        max_abs=measured.max_abs if measured else None,
        clipped=measured.clipped if measured else None,
        zeros=measured.zeros if measured else None,
        sqnr=measured.sqnr if measured else None,
        gain=measured.gain if measured else None,
        macs=record.macs,
        share=record.macs / total if total else 0.0,
        graph=None if part is None else names[part],
        reason=record.reason,
    )


def _cells(row: Row) -> tuple[str, ...]:
    spread = row.clip_min is not None and row.clip_min != row.clip_max
    return (
        row.node,
        row.op,
        row.operand,
        "x".join(map(str, row.shape)),
        "float" if row.bits is None else str(row.bits),
        "" if row.signed is None else "yes" if row.signed else "no",
        row.granularity or "",
        _number(row.clip, ".4g"),
        f"{row.clip_min:.3g}..{row.clip_max:.3g}" if spread else "",
        _number(row.max_abs, ".4g"),
        _number(row.clipped, ".2f", 100),
        _number(row.zeros, ".1f", 100),
        _number(row.sqnr, ".2f"),
        _number(row.gain, "+.2f"),
        _si(row.macs),
        f"{100 * row.share:.2f}",
        row.graph or "",
        row.reason or "",
    )


def _alignment(headers: tuple[str, ...]) -> tuple[str, ...]:
    words = ("node", "op", "operand", "signed", "granularity", "clip range", "graph", "reason")
    return tuple("left" if header in words else "right" for header in headers)


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "" if value is None else format(value * scale, form)


def _si(count: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)
