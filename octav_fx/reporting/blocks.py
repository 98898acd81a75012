"""The rows of a model summed up by block."""

from collections.abc import Sequence
from dataclasses import dataclass

from octav_fx.reporting.rows import Row


@dataclass(frozen=True, slots=True)
class Block:
    """The nodes below one path: layer1.0, encoder.layer.3, classifier."""

    name: str
    nodes: int
    # Multiply-accumulates, and their share of the model's.
    macs: int
    share: float
    # The share of them with quantized operands only.
    quantized: float
    # Over the operands, in dB; None where nothing was measured.
    mean_sqnr: float | None
    least_sqnr: float | None
    # The operand with the least, by its name inside of the block.
    least_at: str


def blocks(rows: Sequence[Row]) -> list[Block]:
    """Return the blocks of a model in their order; none where each would be a single node, or one all of them."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(block_of(row.node), []).append(row)
    nodes = len({row.node for row in rows})
    return [_block(name, inside) for name, inside in found.items()] if 1 < len(found) < nodes else []


def block_of(node: str) -> str:
    """Return the path of a node up to its first number, else up to its first dot."""
    parts = node.partition(":")[0].split(".")
    number = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def _block(name: str, rows: Sequence[Row]) -> Block:
    macs, shares = ({row.node: getattr(row, field) for row in rows} for field in ("macs", "share"))
    keeps_float = {row.node for row in rows if row.bits is None}
    total = sum(macs.values())
    measured = [(row.sqnr, row) for row in rows if row.sqnr is not None]
    least, at = min(measured, key=lambda pair: pair[0]) if measured else (None, None)
    return Block(
        name=name,
        nodes=len(macs),
        macs=total,
        share=sum(shares.values()),
        quantized=sum(count for node, count in macs.items() if node not in keeps_float) / total if total else 0.0,
        mean_sqnr=sum(sqnr for sqnr, _ in measured) / len(measured) if measured else None,
        least_sqnr=least,
        least_at="" if at is None else f"{at.node.removeprefix(name).lstrip('.')} {at.operand}".strip(),
    )
