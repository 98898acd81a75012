"""The codes that the quantizers of a deployed model give, on levels or on codes."""

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from octav_fx.capture.integer_module import IntegerModule
from octav_fx.formats.granularity import along
from octav_fx.formats.grid import Grid
from octav_fx.ir.dataflow import readers
from octav_fx.ir.movement import selects
from octav_fx.ir.ops import module_of
from octav_fx.nn import StaticQuantizer
from octav_fx.nn.integer import (
    code_cat,
    code_mean,
    code_sum,
    gated_codes,
    integer_codes,
    integer_conv,
    integer_linear,
    integer_sum,
    levels,
    lookup,
    max_pool,
)

# Where the scale of the codes, or another tensor of their quantizer, stands among the arguments.
_STATE: Final = {integer_codes: 1, integer_sum: 3, code_sum: 4, code_mean: 2, code_cat: 1, gated_codes: 3, lookup: 1}
# What reads codes and returns floats.
_FLOATS: Final = (levels, integer_conv, integer_linear)


# Of each quantizer of activations, by its path, in the order of its calls, uint8 counted from the lowest.
Codes = dict[str, list[Tensor]]


def codes_of_quantizers(
    converted: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Codes | None = None
) -> Codes:
    """Return the codes of each quantizer of activations in one call of a converted model.

    given: what is read in place of them, so that each layer computes from these codes, whatever those before it return.
    """
    found: Codes = {}
    with torch.no_grad(), _interpreted(converted, found, given):
        converted(*args, **kwargs)
    return found


@contextmanager
def _interpreted(converted: nn.Module, found: Codes, given: Codes | None) -> Iterator[None]:
    """Let the graphs of a converted model be run node by node inside, and their codes be kept and given."""

    def interpreted(path: str, module: IntegerModule) -> Callable[..., Any]:
        return lambda _, *args, **others: _Run(module, path, others, found, given).run(*args)

    parts = [(path, part) for path, part in converted.named_modules() if isinstance(part, IntegerModule)]
    graphs = [(path, graph) for path, part in parts for graph in (part, *part.octav_further)]
    before = [graph.octav_guarded.function() for _, graph in graphs]
    for path, graph in graphs:
        graph.octav_guarded.set_function(interpreted(f"{path}." if path else "", graph))
    try:
        yield
    finally:
        for (_, graph), function in zip(graphs, before, strict=True):
            graph.octav_guarded.set_function(function)


def nodes_on_codes(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes of a converted graph that return codes: those that make them, and those that move them."""
    found = set[fx.Node]()
    for node in graph.nodes:
        is_of_sum = node.target is operator.getitem and node.args[0].target is integer_sum
        if is_of_sum:
            moves = node.args[1] == 1
        else:
            moves = node.target not in _FLOATS and not found.isdisjoint(node.all_input_nodes)
        # A sum returns both, and the codes of it are taken out.
        if moves or (_scale(node) is not None and node.target is not integer_sum):
            found.add(node)
    return found


def moved(found: Codes, expected: Codes) -> dict[str, float]:
    """Return the share of codes that differ, by quantizer.

    One of what is on its grid already, a max pool of its own levels, is none where layers read codes.
    """
    shares = {}
    for name, calls in expected.items():
        if name not in found:
            continue
        differ = sum(int((ours != theirs).sum()) for ours, theirs in zip(found[name], calls, strict=True))
        shares[name] = differ / max(sum(codes.numel() for codes in calls), 1)
    return shares


class _Run(fx.Interpreter):
    """Runs a graph and keeps the codes of each quantizer, where the quantizer stood before codes flowed."""

    def __init__(
        self, module: IntegerModule, prefix: str, others: dict[str, Any], found: Codes, given: Codes | None
    ) -> None:
        super().__init__(module)
        # What **kwargs of the graph takes.
        self.others = others
        # Of the paths of quantizers, which the graph knows from its own module on.
        self.prefix = prefix
        self.found, self.given = found, given
        # By the node of what is looked up and that of the table.
        self.looked_up: dict[Any, Tensor] = {}
        scales = {node: _scale(node) for node in module.graph.nodes}
        self.places = {_last(node): scale for node, scale in scales.items() if scale is not None}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.others if str(target).startswith("**") else super().placeholder(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n.target in (integer_conv, integer_linear) and (table := n.kwargs.get("table")) is not None:
            return self._run_looked_up(n, table)
        value = super().run_node(n)
        quantizer = module_of(n) if n.op == "call_module" else None
        if isinstance(quantizer, StaticQuantizer):
            scale, low = along(quantizer.scale, value, quantizer.dim), Grid(quantizer.bits, quantizer.signed).low
            codes = self._read(str(n.target), ((value / scale).round() - low).to(torch.uint8))
            return value if self.given is None else (codes.to(value.dtype) + low) * scale
        if n not in self.places:
            return value
        if isinstance(value, tuple):
            return value[0], self._read(self.places[n], value[1])
        return self._read(self.places[n], value)

    def _run_looked_up(self, n: fx.Node, table: Any) -> Any:
        """Run a layer that looks up its codes on these codes themselves."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        kwargs = dict(kwargs)
        codes = lookup(args[0], kwargs.pop("table"))
        # Other layers may read them, too.
        if (read := (n.args[0], table)) not in self.looked_up:
            self.looked_up[read] = self._read(str(table.target).rpartition(".")[0], codes)
        value = self.call_function(n.target, (self.looked_up[read], *args[1:]), kwargs)
        return value if n not in self.places else self._read(self.places[n], value)

    def _read(self, name: str, codes: Tensor) -> Tensor:
        """Keep the codes of a call of a quantizer; return those that are read."""
        path = self.prefix + name
        calls = self.found.setdefault(path, [])
        calls.append(codes)
        return codes if self.given is None else self.given[path][len(calls) - 1]


def _scale(node: fx.Node) -> str | None:
    """Return the quantizer, as its graph knows it, whose codes a node returns; None if it returns none."""
    scale: Any = None
    if node.target in (integer_conv, integer_linear):
        scale = node.kwargs.get("step")
    elif node.op == "call_function" and node.target in _STATE:
        scale = node.args[_STATE[node.target]]
    return None if scale is None else str(scale.target).rpartition(".")[0]


def _last(node: fx.Node) -> fx.Node:
    """Return the last of the nodes that move codes from a node to a layer."""
    while len(found := readers(node)) == 1:
        (reader,) = found
        if reader.target not in (max_pool, F.pad) and not selects(reader):
            return node
        node = reader
    return node
