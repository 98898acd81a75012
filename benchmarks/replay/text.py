"""Texts that stay the same where the compiler does the same: no addresses, folders, lines or paths of our modules."""

import hashlib
import re
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

import octav_fx
from benchmarks.replay.internals import graph_text
from octav_fx import OctavError
from octav_fx.capture.modules import graphs_of

# Pattern -> what stands in its place.
_NORMAL: Final = (
    # <function f at 0x7f...>
    (re.compile(r" at 0x[0-9a-f]+"), ""),
    # /home/me/octav_fx/nets.py:31 -> nets.py
    (re.compile(r"(?:[\w.~-]*/)*([\w.-]+\.py):\d+"), r"\1"),
    # octav_fx.graph.rebuild.Rebuilt -> Rebuilt, but octav_fx.quantize is a public name.
    (re.compile(r"\b(?:octav_fx|benchmarks)(?:\.\w+)+\.(?=\w)"), ""),
)
# Where tables and reports look instead of running the model: figures that a CPU rounds are none of ours.
_NO_DATA: Final = torch.empty(0, device="meta")


def normal(text: str) -> str:
    """Strip what depends on where files are and on the process."""
    for pattern, replacement in _NORMAL:
        text = pattern.sub(replacement, text)
    return text


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def graph_lines(graph: fx.Graph) -> str:
    """Write the inputs of a graph, and a line for each of its other nodes."""
    inputs = [f"{node.name} = input({node.target}{_default(node)})" for node in graph.find_nodes(op="placeholder")]
    return normal("\n".join([*inputs, graph_text(graph)]))


def prepared(q: nn.Module, training: bool) -> str:
    """Write the graph of each part of a quantized model in one mode, and the quantizers and constants it reads."""
    try:
        q.train(training)
    except OctavError as error:
        return normal(f"none: {error}")
    parts = {name: part for name, module in q.named_modules() if (part := graphs_of(module)) is not None}
    return "\n\n".join(f"# {name or 'the model'}\n{_part(part)}" for name, part in parts.items())


def table(q: nn.Module) -> str:
    """Write what became of each operand in both modes, and what stands under the table, without measured figures."""
    pages = []
    for training in (True, False):
        try:
            q.train(training)
        except OctavError:
            # The graphs say why.
            continue
        lines = ["| ".join(map(str, _cells(row))) for row in octav_fx.rows(q, _NO_DATA)]
        covered = octav_fx.coverage(q)
        skipped = [f"{node}: {reason} ({macs})" for node, reason, macs in covered.skipped]
        share = f"{covered.quantized_macs} of {covered.total_macs} MACs"
        notes = octav_fx.table(q, _NO_DATA).rpartition("\n\nquantized: ")[2]
        pages.append("\n".join([f"# {'training' if training else 'eval'}", *lines, share, *skipped, notes]))
    return normal("\n\n".join(pages))


def _cells(row: octav_fx.Row) -> tuple[Any, ...]:
    shape = "x".join(map(str, row.shape))
    return (
        *(row.node, row.op, row.operand, shape, row.bits, row.signed),
        *(row.granularity, row.macs, row.graph, row.reason),
    )


def _default(node: fx.Node) -> str:
    return f" = {node.args[0]!r}" if node.args else ""


def _part(part: fx.GraphModule) -> str:
    return "\n".join([graph_lines(part.graph), *map(normal, _state(part))])


def _state(part: fx.GraphModule) -> Iterator[str]:
    """A line for each module and tensor that a graph reads, in the order in which it does."""
    seen = set[str]()
    for node in part.graph.nodes:
        if node.op not in ("get_attr", "call_module") or node.target in seen:
            continue
        seen.add(str(node.target))
        value = _attribute(part, str(node.target))
        if isinstance(value, Tensor):
            kind = "parameter" if isinstance(value, nn.Parameter) else "buffer"
            yield f"{node.target}: {kind} {value.dtype} {list(value.shape)}"
        else:
            yield f"{node.target}: {' '.join(repr(value).split())}"


def _attribute(part: nn.Module, path: str) -> Any:
    value: Any = part
    for name in path.split("."):
        value = getattr(value, name)
    return value
