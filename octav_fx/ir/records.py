"""What was decided for each operand: plain data that outlives the graph's metadata."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, fx

from octav_fx.ir.edits import Edit, site_of
from octav_fx.ir.ops import op_of
from octav_fx.ir.rules import rule_of
from octav_fx.nn.fake_quantizer import QUANTIZERS


@dataclass(frozen=True, slots=True)
class Record:
    """One operand of one matmul or convolution; or, with operand None, a node that no rule speaks of."""

    site: str
    op: str
    operand: str | None
    # Shape of the operand for the example inputs.
    shape: tuple[int, ...]
    # Multiply-accumulates of the whole node for the example inputs, the same in each of its records.
    macs: int
    # Path of the quantizer, or None and the reason why the operand stays float.
    quantizer: str | None
    reason: str | None = None


def records(graph: fx.Graph, edits: Iterable[Edit]) -> list[Record]:
    """One record per operand of each contraction in a captured and rewritten graph, in the graph's order."""
    reasons = {(edit.node, edit.operand): edit.detail for edit in edits if edit.declined}
    rows = []
    for node in graph.nodes:
        op, macs = op_of(node), node.meta.get("macs", 0)
        rule = rule_of(node)
        site = str(node.target) if node.op == "call_module" and "site" not in node.meta else site_of(node)
        if rule is None or (whole := reasons.get((site, None))) is not None:
            if macs:
                kind = op.name if op is not None else str(getattr(node.target, "__name__", node.target))
                rows.append(Record(site, kind, None, _shape(node), macs, None, reasons.get((site, None), "no rule")))
            continue
        positions = [(operand.index, operand.name) for operand in rule.operands]
        if rule.variadic:
            start, name = positions[0]
            positions = [(i, f"{name}{i - start}") for i in range(start, len(node.args))]
            positions = positions if len(positions) > 1 else []
        for index, name in positions:
            value = node.args[index]
            assert isinstance(value, fx.Node)
            is_quantized = value.op == "call_module" and str(value.target).startswith(QUANTIZERS + ".")
            source = value.args[0] if is_quantized else value
            assert isinstance(source, fx.Node)
            quantizer = str(value.target) if is_quantized else None
            reason = None if is_quantized else reasons.get((site, name), whole or "no rule")
            rows.append(Record(site, rule.op, name, _shape(source), macs, quantizer, reason))
    return rows


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("value")
    return tuple(value.shape) if isinstance(value, Tensor) else ()
