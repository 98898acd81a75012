"""What was decided for each operand: plain data that outlives the graph's metadata."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from torch import Tensor, fx, nn

from octav_fx.ir.arguments import module_input, operand_of, operands_of
from octav_fx.ir.edits import Edit, site_of
from octav_fx.ir.meta import fake, info
from octav_fx.ir.movement import quantizer_before
from octav_fx.ir.ops import op_of, op_of_module

# The reason of a layer that the example inputs do not lead to.
NOT_CALLED: Final = "not called for the example inputs"


@dataclass(frozen=True, slots=True)
class Record:
    """One operand of one matmul or convolution; or, with operand None, a node that no row speaks of."""

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


@dataclass(frozen=True, slots=True)
class GraphInfo:
    """What outlives the making of a module's graphs; modes are those of nn.Module.training."""

    # Where in the model the module was found, and whether it is a single op: what sites.in_model makes names of.
    path: str = ""
    is_op: bool = False
    # The fields of the Config it was made with.
    config: Mapping[str, Any] = field(default_factory=dict)
    # What became of each operand, for each mode.
    records: Mapping[bool, list[Record]] = field(default_factory=dict)
    # What the user has to know, for the end of the table.
    notes: tuple[str, ...] = ()
    # Why a mode has no graph, if one has none.
    missing: str | None = None
    # Of a converted module: each matmul and convolution, and why it multiplies floats; None if it multiplies codes.
    integers: tuple[tuple[str, str | None], ...] = ()
    # Fingerprints of the graphs that were frozen, for each mode.
    frozen: Mapping[bool, str] = field(default_factory=dict)


_KEY: Final = "octav"


def graph_info(module: nn.Module) -> GraphInfo:
    """Return what is kept with the graphs of a quantized or converted module."""
    meta: dict[str, Any] = module.meta  # type: ignore[assignment]
    return meta.get(_KEY, GraphInfo())


def update_graph_info(module: nn.Module, **changes: Any) -> None:
    """Replace fields of what is kept with the graphs of a module."""
    module.meta[_KEY] = replace(graph_info(module), **changes)  # type: ignore[index, operator, assignment]


def records(graph: fx.Graph, edits: Iterable[Edit]) -> list[Record]:
    """Return one record per operand of each contraction in a captured and rewritten graph, in the graph's order."""
    reasons = {(edit.node, edit.operand): edit.detail for edit in edits if edit.declined}
    rows = []
    for node in graph.nodes:
        op, macs = op_of(node), info(node).macs
        site = str(node.target) if node.op == "call_module" and info(node).site is None else site_of(node)
        if op is None or not op.operands or (site, None) in reasons:
            if macs:
                kind = op.name if op is not None else str(getattr(node.target, "__name__", node.target))
                rows.append(Record(site, kind, None, _shape(node), macs, None, reasons.get((site, None), "no rule")))
            continue
        for operand in operands_of(node):
            value = operand_of(node, operand)
            assert isinstance(value, fx.Node)
            call = quantizer_before(value, node)
            source = module_input(value) if value is call else value
            quantizer = None if call is None else str(call.target)
            reason = None if call is not None else reasons.get((site, operand.name), "no rule")
            rows.append(Record(site, op.name, operand.name, _shape(source), macs, quantizer, reason))
    return rows


def idle_records(root: nn.Module, graph: fx.Graph) -> list[Record]:
    """Return a record for each layer below root that a graph neither calls nor reads a parameter of."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    # A graph that stores what forward stored reads the module itself, under a name of its own.
    read = {id(_attribute(root, str(n.target))) for n in graph.nodes if n.op == "get_attr" and fake(n) is not None}
    rows = []
    for path, module in root.named_modules():
        op = op_of_module(module)
        if op is None or not op.operands or not read.isdisjoint({id(module), *map(id, module.parameters())}):
            continue
        if not any(f"{name}.".startswith(f"{path}.") or path.startswith(f"{name}.") for name in called):
            rows.append(Record(path, type(module).__name__, None, (), 0, None, NOT_CALLED))
    return rows


def _attribute(root: nn.Module, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), root)


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = fake(node)
    return tuple(value.shape) if isinstance(value, Tensor) else ()
