"""Read a function of one code from a table, where a quantizer takes its result.

    integer_codes(silu(quantizer1(x)), s2, bits2, signed2)
        ->  lookup(integer_codes(x, s1, bits1, signed1), quantizer2.table)
    integer_codes(levels(codes, s1, bits1, signed1), s2, bits2, signed2)
        ->  lookup(codes, quantizer2.table)

    table[code] = integer_codes(silu(levels(code, s1, bits1, signed1)), s2, bits2, signed2)       uint8 [256]

A table that returns each code as it is, is none.

for whatever is computed of one quantized value element by element: x * relu6(x + 3) / 6 as well as one call. The table
is filled by running the nodes themselves, so codes stay what they were, and no float goes through memory. Where
something else writes into one of these values on the way, all stays.
"""

import functools
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from octav_fx.ir.arguments import bound_arguments
from octav_fx.ir.dataflow import writes_for_others, written_before
from octav_fx.ir.edits import Edit, erase_with_sources
from octav_fx.ir.op import Trait
from octav_fx.ir.ops import module_of, op_of
from octav_fx.nn.integer import integer_codes, levels, lookup
from octav_fx.passes.convert.on_codes import OnCodes, grid_of, is_levels, on_codes

_CODES: Final = 256
_TABLE: Final = "table"


def functions_of_codes(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits: list[Edit] = []
    for node in list(gm.graph.find_nodes(op="call_function", target=integer_codes)):
        if (found := _function(node)) is None:
            continue
        source, steps = found
        x = on_codes(source)
        quantizer = str(bound_arguments(node)["scale"].target).removesuffix(".scale")
        table = _table(gm, x, [*steps, node])
        if torch.equal(table[: 2**x.bits], torch.arange(2**x.bits, dtype=table.dtype, device=table.device)):
            node.replace_all_uses_with(x.codes)
            erase_with_sources(node)
            edits.append(Edit(quantizer, "remove", "returns the codes that it reads"))
            continue
        name = _unused(gm.get_submodule(quantizer))
        gm.get_submodule(quantizer).register_buffer(name, table)
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(lookup, (x.codes, gm.graph.get_attr(f"{quantizer}.{name}")))
        node.replace_all_uses_with(new)
        erase_with_sources(node)
        edits.append(Edit(quantizer, "tabulate", ", ".join(step.name for step in steps) or f"{x.bits} bits"))
    return edits


def _function(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """Return the one quantized value that codes are computed from, and the pointwise nodes between, in their order."""
    sources, steps, waiting = set[fx.Node](), set[fx.Node](), [bound_arguments(node)["x"]]
    while waiting:
        value = waiting.pop()
        op = op_of(value)
        if grid_of(value) is not None:
            sources.add(value)
        elif op is None or Trait.POINTWISE not in op.traits or not value.all_input_nodes or writes_for_others(value):
            return None
        else:
            steps.add(value)
            waiting += [given for given in value.all_input_nodes if given not in steps]
    if len(sources) != 1 or any(written_before(value, node, steps) for value in sources | steps):
        return None
    return sources.pop(), sorted(steps)


def _table(gm: fx.GraphModule, x: OnCodes, steps: list[fx.Node]) -> Tensor:
    """Return what the last of some nodes, which compute codes from levels, gives for each code."""
    known: dict[fx.Node, Any] = {}

    def value(given: fx.Node) -> Any:
        if given.op == "get_attr":
            return functools.reduce(getattr, str(given.target).split("."), gm)
        # What is no step is the levels themselves.
        return known.setdefault(given, all_levels) if is_levels(given) else known[given]

    scale = value(x.scale)
    all_levels = levels(torch.arange(_CODES, device=scale.device).to(torch.uint8), scale, x.bits, x.signed)
    for step in steps:
        args, kwargs = fx.node.map_arg((step.args, step.kwargs), value)
        match step.op:
            case "call_module":
                known[step] = module_of(step)(*args, **kwargs)
            case "call_method":
                known[step] = getattr(args[0], str(step.target))(*args[1:], **kwargs)
            case _:
                known[step] = step.target(*args, **kwargs)  # type: ignore[operator]
    return known[steps[-1]]


def tables_of(quantizer: nn.Module) -> int:
    """Return how many tables a quantizer has: one for each value that it is called for."""
    return sum(name.startswith(_TABLE) for name, _ in quantizer.named_buffers())


def _unused(quantizer: nn.Module) -> str:
    """Return the name of a further table: a quantizer may be called for several values."""
    count = tables_of(quantizer)
    return f"{_TABLE}_{count}" if count else _TABLE
