"""The codes that the quantizers of a deployed model give, on levels or on codes."""

import inspect
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx
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
    lookup,
    max_pool,
)

# Where the scale of the codes, or another tensor of their quantizer, stands among the arguments.
_STATE: Final = {integer_codes: 1, integer_sum: 3, code_sum: 4, code_mean: 2, code_cat: 1, gated_codes: 3, lookup: 1}


# Of each quantizer of activations, in the order of its calls, uint8 counted from the lowest.
Codes = dict[str, list[Tensor]]


def codes_of_quantizers(
    module: IntegerModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Codes | None = None
) -> Codes:
    """Return the codes of each quantizer of activations.

    given: what is read in place of them, so that each layer computes from these codes, whatever those before it return.
    """
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    run = _Run(module, given)
    with torch.no_grad():
        run.run(*bound.args, *bound.kwargs.values())
    return run.found


def moved(found: Codes, expected: Codes) -> dict[str, float]:
    """Return the share of codes that differ, by quantizer."""
    shares = {}
    for name, calls in expected.items():
        differ = sum(int((ours != theirs).sum()) for ours, theirs in zip(found[name], calls, strict=True))
        shares[name] = differ / max(sum(codes.numel() for codes in calls), 1)
    return shares


class _Run(fx.Interpreter):
    """Runs a model and keeps the codes of each quantizer, where the quantizer stood before codes flowed."""

    def __init__(self, module: IntegerModule, given: Codes | None) -> None:
        super().__init__(module)
        self.given = given
        self.found: Codes = {}
        # By the node of what is looked up and that of the table.
        self.looked_up: dict[Any, Tensor] = {}
        scales = {node: _scale(node) for node in module.graph.nodes}
        self.places = {_last(node): scale for node, scale in scales.items() if scale is not None}

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
        calls = self.found.setdefault(name, [])
        calls.append(codes)
        return codes if self.given is None else self.given[name][len(calls) - 1]


def _scale(node: fx.Node) -> str | None:
    """Return the path of the quantizer whose codes a node returns; None if it returns none."""
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
