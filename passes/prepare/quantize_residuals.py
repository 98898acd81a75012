"""Put a fake-quantizer where an integer runtime writes a tensor: joins, global pools, functions of convolutions.

    add(x, y)                        ->  add(quantizers.add_x(x), quantizers.add_y(y))
    adaptive_avg_pool2d(x, 1)        ->  adaptive_avg_pool2d(quantizers.pool_x(x), 1)
    silu(batch_norm(conv2d(...)))    ->  silu(quantizers.silu_x(batch_norm(conv2d(...))))

    conv2d(quantizers.conv_input(x), w), add(x, y)            where the operand of conv2d has fewer bits than a sum:
        ->  z = quantizers.add_x(x)
            conv2d(quantizers.conv_input(z), w), add(z, ...)

A tensor has one quantizer that reads it, the widest: whatever else reads the tensor reads its levels, narrower
quantizers too. An integer runtime writes a tensor once, and a sum with a float operand keeps what is around it in
float. Sums with constants, broadcast ones and those of integers are no joins. A kernel of a convolution returns codes,
and what is then computed of each is a table of 256; a clamp needs neither, and linear layers return floats as well.
It is Config.residual_bits, off by default.
"""

from typing import Any, Final

from torch import Tensor, fx

from octav_fx.ir.arguments import arguments, operand_of, set_operand
from octav_fx.ir.clamps import clamp_bounds
from octav_fx.ir.dataflow import state_only, tensor_flow
from octav_fx.ir.edits import Edit, site_of
from octav_fx.ir.meta import fake, info, set_fake, update
from octav_fx.ir.op import Op, Operand, Role, Trait, activation
from octav_fx.ir.ops import in_place, module_of, op_of
from octav_fx.ir.pools import axes_of_mean
from octav_fx.ir.signedness import nonnegative
from octav_fx.ir.sites import in_scope, numbered
from octav_fx.ir.table.layers import BATCH_NORM
from octav_fx.nn import FakeQuantizer
from octav_fx.passes.prepare.quantize_operands import Choose, Place, add_quantizer

_SUM: Final = (activation(0, "x"), activation(1, "y"))
_ONE: Final = (activation(0, "x"),)


def quantize_residuals(gm: fx.GraphModule, choose: Choose) -> list[Edit]:
    """See the module's docstring."""
    edits: list[Edit] = []
    constant, unsigned = state_only(tensor_flow(gm.graph)), nonnegative(gm.graph)
    for node in list(gm.graph.nodes):
        if info(node).op is not None or (operands := _operands(node, constant)) is None:
            continue
        op = op_of(node)
        assert op is not None
        # A row of its own, as a user's function has, puts it into tables.
        update(node, site=_site(node, gm.graph), op=Op(op.name, operands, traits=op.traits))
        edits += [
            _quantize(gm, node, operand, unsigned, choose)
            for operand in operands
            if _quantizer(operand_of(node, operand)) is None
        ]
    return edits


def _operands(node: fx.Node, constant: set[fx.Node]) -> tuple[Operand, ...] | None:
    """Return the operands of a join of two paths, a global pool or a function of a convolution; else None."""
    op = op_of(node)
    if axes_of_mean(node) is not None or _is_function_of_convolution(node):
        return _ONE
    if op is None or op.name != "add" or len(node.args) != 2 or node.kwargs:
        return None
    values = [fake(source) for source in node.args if isinstance(source, fx.Node)]
    if not all(isinstance(value, Tensor) and value.is_floating_point() for value in values):
        return None
    joins = len(values) == 2 and values[0].shape == values[1].shape and constant.isdisjoint(node.all_input_nodes)
    return _SUM if joins else None


def _is_function_of_convolution(node: fx.Node) -> bool:
    """Tell whether a node is a function of each element that a convolution or its norm returns, other than a clamp."""
    op = op_of(node)
    sources = node.all_input_nodes
    is_function = op is not None and Trait.POINTWISE in op.traits and list(arguments(node).values())[:1] == sources
    if not is_function or clamp_bounds(node) is not None:
        return False
    before = op_of(sources[0])
    if before is BATCH_NORM:
        before = op_of(sources[0].all_input_nodes[0])
    return before is not None and before.spatial > 0


def _quantize(gm: fx.GraphModule, node: fx.Node, operand: Operand, unsigned: set[fx.Node], choose: Choose) -> Edit:
    value: Any = operand_of(node, operand)
    site, op = site_of(node), op_of(node)
    assert op is not None
    place = Place(
        site,
        op.name,
        operand.name,
        Role.ACTIVATION,
        False,
        value not in unsigned,
        None,
        residual=True,
        shape=tuple(fake(value).shape),
    )
    settings = choose(place)
    if isinstance(settings, str):
        return Edit.by_config(node, settings, operand.name)
    if in_place(node) and operand.index == 0 and any(reader > node for reader in value.users):
        return Edit.unsupported(node, f"{value.name} is read after the sum has been written into it", operand.name)
    if any(in_place(reader) and reader is not node for reader in value.users):
        return Edit.unsupported(node, f"{value.name} is written in place by another node", operand.name)
    known = {reader: q.spec.format.bits for reader in value.users if (q := _quantizer(reader)) is not None}
    wide = max(known, key=known.__getitem__, default=None)
    if wide is None or known[wide] < settings.spec.format.bits:
        with gm.graph.inserting_after(value):
            wide = gm.graph.call_module(add_quantizer(gm, place, settings, value, running=True), (value,))
    else:
        value.append(wide)
    set_fake(wide, fake(value))
    value.replace_all_uses_with(wide, delete_user_cb=lambda reader: reader is not wide)
    set_operand(node, operand, wide)
    return Edit(site, "quantize", f"{known.get(wide, settings.spec.format.bits)} bits", operand.name)


def _quantizer(node: Any) -> FakeQuantizer | None:
    module = module_of(node) if isinstance(node, fx.Node) and node.op == "call_module" else None
    return module if isinstance(module, FakeQuantizer) else None


def _site(node: fx.Node, graph: fx.Graph) -> str:
    """Return the module's path, else that of the enclosing module with the op's name; further calls are numbered."""
    op = op_of(node)
    assert op is not None
    base = str(node.target) if node.op == "call_module" else in_scope(node, op.name)
    return numbered(base, {site_of(other) for other in graph.nodes if other is not node})
