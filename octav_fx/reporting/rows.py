"""What became of each operand, as rows, and the share of the multiply-accumulates that is quantized."""

import csv
import dataclasses
import fnmatch
import importlib
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from octav_fx.capture.modules import QuantizedModule, graphs_of, quantized_modules
from octav_fx.capture.partial import float_records, outermost
from octav_fx.errors import OctavError
from octav_fx.formats.grid import Grid
from octav_fx.ir.records import Record
from octav_fx.nn import FakeQuantizer
from octav_fx.reporting.html import html_table
from octav_fx.reporting.measure import Statistics, measured, statistics_of


@dataclass(frozen=True, slots=True)
class Row:
    """One operand. Statistics are of one forward on the example inputs, None where nothing was or could be run."""

    node: str
    op: str
    operand: str
    shape: tuple[int, ...]
    # None where the operand stays float; then reason says why.
    bits: int | None
    # "int", or another number format.
    format: str | None
    # Bits of a code, and of its share of the scales.
    bits_per_element: float | None
    signed: bool | None
    # "tensor", "channel", "token" or "group-N", with the axis.
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


class Rows(list[Row]):
    """A list of Row that knows how to be a data frame, JSON, CSV, and a table in a notebook."""

    def chosen(self, filter: str | Callable[[Row], bool] | None = None, sort: str | None = None) -> "Rows":
        """Return the rows that filter lets through, ordered by sort.

        filter: a glob of node names, or a function of a Row. sort: a field of Row, least first; with "-" before it,
        greatest first. Rows without a value are last. Raises OctavError for a field that Row does not have.
        """
        if isinstance(filter, str):
            found = [row for row in self if fnmatch.fnmatchcase(row.node, filter)]
        else:
            found = [row for row in self if filter is None or filter(row)]
        if sort is None:
            return Rows(found)
        name = sort.removeprefix("-")
        if name not in _FIELDS:
            raise OctavError(f"sort={sort!r}: one of {', '.join(_FIELDS)}, with - before it for the greatest first")
        known = [row for row in found if getattr(row, name) is not None]
        known.sort(key=lambda row: getattr(row, name), reverse=sort.startswith("-"))
        return Rows([*known, *(row for row in found if getattr(row, name) is None)])

    def to_json(self) -> str:
        """Return a JSON list of objects. JSON has no infinity: the SQNR of what is exact is null."""
        values = [{name: finite(value) for name, value in dataclasses.asdict(row).items()} for row in self]
        return json.dumps(values, indent=1)

    def to_csv(self) -> str:
        """Return CSV with a line of names; empty where a row has no value."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**dataclasses.asdict(row), "shape": "x".join(map(str, row.shape))} for row in self)
        return text.getvalue()

    def to_pandas(self) -> Any:
        """Return a pandas.DataFrame with a line for each row. Raises OctavError where pandas is not installed."""
        try:
            pandas = importlib.import_module("pandas")
        except ModuleNotFoundError as error:
            raise OctavError("to_pandas needs pandas: pip install pandas; to_json and to_csv do without") from error
        return pandas.DataFrame([dataclasses.asdict(row) for row in self], columns=list(_FIELDS))

    def _repr_html_(self) -> str:
        return html_table(_FIELDS, [list(dataclasses.asdict(row).values()) for row in self])


_FIELDS = tuple(field.name for field in dataclasses.fields(Row))


def finite(value: Any) -> Any:
    """Return a value as JSON can have it: None for inf and NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, slots=True)
class Coverage:
    """Multiply-accumulates of the example inputs. skipped: (node, reason, macs) for each node not wholly quantized."""

    quantized_macs: int
    total_macs: int
    skipped: list[tuple[str, str, int]]

    @property
    def share(self) -> float:
        """Return the share that is quantized; 0 where nothing multiplies."""
        return self.quantized_macs / self.total_macs if self.total_macs else 0.0


def rows(q: nn.Module, example_inputs: Any = None) -> Rows:
    """Return a Row for each operand of each matmul and convolution, and one for each node that no rule covers.

    Measures one forward in q's mode on example_inputs, by default those given to quantize(); parameters, statistics
    and random states stay as they are.
    """
    quantized = outermost(q)
    statistics = measured(quantized, example_inputs, statistics_of)
    found = records_of(quantized)
    total = _total([record for _, record in found])
    names = {graphs_of(module): name for name, module in quantized.named_modules()}
    return Rows(_row(part, record, statistics, total, names) for part, record in found)


def coverage(q: nn.Module) -> Coverage:
    """Count how much of the model's work is quantized, and say what is not."""
    nodes: dict[str, list[Record]] = {}
    for _, record in records_of(outermost(q)):
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


def records_of(quantized: nn.Module) -> list[tuple[QuantizedModule | None, Record]]:
    """Return each record and the graph it is of; None for what no graph holds."""
    found = [(part, record) for part in quantized_modules(quantized) for record in part.records]
    return [*found, *((None, record) for record in float_records(quantized))]


def _total(found: list[Record]) -> int:
    return sum({record.site: record.macs for record in found}.values())


def _row(
    part: QuantizedModule | None,
    record: Record,
    statistics: Mapping[nn.Module, Statistics],
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
        bits=spec.format.bits if spec else None,
        format=None if spec is None else "int" if isinstance(spec.format, Grid) else spec.format.name,
        bits_per_element=None if spec is None else spec.bits_per_element(record.shape),
        signed=spec.format.signed if spec else None,
        granularity=None if spec is None else spec.granularity.label,
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
