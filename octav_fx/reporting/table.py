"""table(): the rows as text for people, no wider than a terminal, with a summary of each block."""

import html
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from torch import nn

from octav_fx.capture.modules import quantized_modules
from octav_fx.capture.partial import outermost, partial_lines
from octav_fx.ir.records import NOT_CALLED, graph_info
from octav_fx.reporting.blocks import Block, blocks
from octav_fx.reporting.rows import Coverage, Row, Rows, coverage, rows

# In dB: below the first, noise is more than a tenth of the power, a third of a value on average; see docs/concepts.md.
_BAD, _POOR = 10.0, 15.0
_RED, _YELLOW, _MAGENTA, _BOLD, _PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[35m", "\x1b[1m", "\x1b[0m"
_GAP: Final = "  "
_LEAST_NAME: Final = 16


T = TypeVar("T")


class Table(str):
    """The text of a table; a notebook shows it as it is printed."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return f'<pre style="overflow-x:auto">{html.escape(self)}</pre>'


@dataclass(frozen=True, slots=True)
class _Column(Generic[T]):
    header: str
    cell: Callable[[T], str]
    right: bool = True
    # The greatest goes first where lines would be too long; 0 stays.
    spare: int = 0


def table(
    q: nn.Module,
    example_inputs: Any = None,
    *,
    filter: str | Callable[[Row], bool] | None = None,
    sort: str | None = None,
    width: int | None = 120,
    color: bool | None = None,
) -> Table:
    """Return rows() as text, with a summary of each block, the coverage, and what passes declined below.

    filter: a glob of node names, or a function of a Row. sort: a field of Row, such as "sqnr"; with "-" before it the
    greatest first. width: columns of text; where that is too few, the columns of the table that matter least are left
    out and then names shortened (rows() has all), None for as many as it takes. color: marks of a terminal; None for
    where standard output is one and NO_COLOR is not set. Raises OctavError for a sort that Row does not have.
    """
    if color is None:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    every = rows(q, example_inputs)
    shown = every.chosen(filter, sort)
    found = _operands(shown, width, color)
    if len(shown) < len(every):
        found += f"\n\nshown: {len(shown)} of {len(every)} rows"
    elif sort is None and (summary := blocks(every)):
        found += f"\n\n{_summary(summary, width, color)}"
    return Table("\n".join([found, "", _covered(coverage(q)), *notes_of(outermost(q))]))


def _covered(covered: Coverage) -> str:
    text = f"quantized: {covered.share:.2%} of {si(covered.total_macs)} MACs"
    idle = sum(reason == NOT_CALLED for _, reason, _ in covered.skipped)
    if idle:
        text += f" of what ran; {idle} module{'s' if idle > 1 else ''} did not run"
    if floats := len(covered.skipped) - idle:
        text += f"; {floats} nodes keep float operands"
    return text


def notes_of(quantized: nn.Module) -> list[str]:
    """Return why modules are in parts, and what passes declined without a loss: lines below a table."""
    own = [note for part in quantized_modules(quantized) for note in graph_info(part).notes]
    return [*partial_lines(quantized), *dict.fromkeys(own)]


def format_name(row: Row) -> str:
    """Return "int4", "uint8", or "float"."""
    if row.bits is None:
        return "float"
    return f"{'' if row.signed else 'u'}int{row.bits}" if row.format == "int" else str(row.format)


def si(count: int) -> str:
    """Return a count with a unit: 1.60 k, 33.18 M, 2.10 G."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


# A float operand has its reason in place of what stands behind the format.
_COLUMNS: Final[tuple[_Column[Row], ...]] = (
    _Column("node", lambda row: row.node, right=False),
    _Column("op", lambda row: row.op, right=False, spare=4),
    _Column("operand", lambda row: row.operand, right=False),
    _Column("shape", lambda row: "x".join(map(str, row.shape)), spare=2),
    _Column("MACs\n%", lambda row: f"{100 * row.share:.2f}"),
    _Column("graph", lambda row: row.graph or "", right=False, spare=7),
    _Column("format", format_name, right=False),
)
_SQNR: Final[_Column[Row]] = _Column("SQNR\ndB", lambda row: _number(row.sqnr, ".1f"))
_STATISTICS: Final[tuple[_Column[Row], ...]] = (
    _Column("scale\nper", lambda row: (row.granularity or "").partition(" ")[0], right=False, spare=5),
    _Column("clip", lambda row: _number(row.clip, ".4g")),
    _Column("max|x|", lambda row: _number(row.max_abs, ".4g"), spare=1),
    _Column("clipped\n%", lambda row: _number(row.clipped, ".2f", 100)),
    _Column("zeros\n%", lambda row: _number(row.zeros, ".1f", 100), spare=6),
    _SQNR,
    _Column("gain\ndB", lambda row: _number(row.gain, "+.1f"), spare=3),
)
_LEAST_SQNR: Final[_Column[Block]] = _Column("least\ndB", lambda block: _number(block.least_sqnr, ".1f"))
_OF_BLOCKS: Final[tuple[_Column[Block], ...]] = (
    _Column("block", lambda block: block.name, right=False),
    _Column("nodes", lambda block: str(block.nodes), spare=1),
    _Column("MACs", lambda block: si(block.macs), spare=3),
    _Column("MACs\n%", lambda block: f"{100 * block.share:.2f}"),
    _Column("quantized\n%", lambda block: f"{100 * block.quantized:.2f}"),
    _Column("mean SQNR\ndB", lambda block: _number(block.mean_sqnr, ".1f"), spare=2),
    _LEAST_SQNR,
    _Column("at", lambda block: block.least_at, right=False, spare=4),
)


def _operands(shown: Rows, width: int | None, color: bool) -> str:
    # One graph holds all of most models.
    own = [column for column in _COLUMNS if column.header != "graph" or any(row.graph for row in shown)]
    cells, sizes = _fitted([*own, *_STATISTICS], shown, width)
    lines = _header(sizes, color)
    for i, row in enumerate(shown):
        known = [column for column in sizes if row.bits is not None or column not in _STATISTICS]
        texts = {column: _aligned(cells[column][i], column.right, sizes[column]) for column in known}
        if row.bits is not None:
            texts[_SQNR] = _marked(texts[_SQNR], _mark(row.sqnr) if color else "")
            lines.append(_GAP.join(texts.values()).rstrip())
            continue
        line = _GAP.join([*texts.values(), ""])
        room = sys.maxsize if width is None else max(width - len(line), _LEAST_NAME)
        reason = textwrap.wrap(row.reason or "", room) or [""]
        first, *others = [_marked(part, _MAGENTA if color else "") for part in reason]
        lines.append((line + first).rstrip())
        lines += [" " * len(line) + part for part in others]
    return "\n".join(lines)


def _summary(found: Sequence[Block], width: int | None, color: bool) -> str:
    cells, sizes = _fitted(_OF_BLOCKS, found, width)
    lines = _header(sizes, color)
    for i, block in enumerate(found):
        texts = {column: _aligned(cells[column][i], column.right, size) for column, size in sizes.items()}
        texts[_LEAST_SQNR] = _marked(texts[_LEAST_SQNR], _mark(block.least_sqnr) if color else "")
        lines.append(_GAP.join(texts.values()).rstrip())
    return "\n".join(lines)


def _fitted(
    columns: Sequence[_Column[T]], items: Sequence[T], width: int | None
) -> tuple[dict[_Column[T], list[str]], dict[_Column[T], int]]:
    """Return the cells of each column, and the sizes of those that fit; the first one shrinks at last."""
    cells = {column: [column.cell(item) for item in items] for column in columns}
    sizes = {column: max(len(text) for text in (*column.header.split("\n"), *texts)) for column, texts in cells.items()}
    name = columns[0]
    while width is not None and (excess := sum(sizes.values()) + len(_GAP) * (len(sizes) - 1) - width) > 0:
        spare = max(sizes, key=lambda column: column.spare)
        if spare.spare:
            del sizes[spare]
        elif sizes[name] <= _LEAST_NAME:
            break
        else:
            sizes[name] = max(_LEAST_NAME, sizes[name] - excess)
            cells[name] = [_shortened(text, sizes[name]) for text in cells[name]]
    return cells, sizes


def _header(sizes: Mapping[_Column[T], int], color: bool) -> list[str]:
    """Return the lines of the headers, the words of each at the bottom, and a rule below them."""
    height = max(column.header.count("\n") + 1 for column in sizes)
    words = {column: [""] * (height - column.header.count("\n") - 1) + column.header.split("\n") for column in sizes}
    lines = [
        _GAP.join(_aligned(words[column][i], column.right, size) for column, size in sizes.items()).rstrip()
        for i in range(height)
    ]
    return [*(_marked(line, _BOLD if color else "") for line in lines), _GAP.join("-" * n for n in sizes.values())]


def _aligned(text: str, right: bool, size: int) -> str:
    return text.rjust(size) if right else text.ljust(size)


def _shortened(text: str, size: int) -> str:
    """Return the end of a path, which names the layer."""
    return text if len(text) <= size else f"…{text[len(text) - size + 1 :]}"


def _mark(sqnr: float | None) -> str:
    return "" if sqnr is None or sqnr >= _POOR else _YELLOW if sqnr >= _BAD else _RED


def _marked(text: str, mark: str) -> str:
    return f"{mark}{text}{_PLAIN}" if mark else text


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "" if value is None else format(value * scale, form)
