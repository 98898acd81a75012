"""Put a fake-quantizer wherever an integer runtime has to write codes, though no layer reads them at once.

Both operands of a residual sum, the input of a global pool, the input of a function (SiLU) behind a convolution, and
results of convolutions that several nodes share:

    add(x, y)                        ->  add(quantizers.add_x(x), quantizers.add_y(y))
    adaptive_avg_pool2d(x, 1)        ->  adaptive_avg_pool2d(quantizers.pool_x(x), 1)
    silu(batch_norm(conv2d(...)))    ->  silu(quantizers.silu_x(batch_norm(conv2d(...))))
    y = conv2d(...); conv2d(quantizers.conv_input(y), w), max_pool2d(y, 3), cat([y, z], 1)
        ->  y = quantizers.pool_x(conv2d(...)); the same calls

    conv2d(quantizers.a_input(y), w), conv2d(quantizers.b_input(max_pool2d(y, 3)), v)
        ->  z = quantizers.a_input(y)
            conv2d(z, w), conv2d(max_pool2d(z, 3), v)

    conv2d(quantizers.conv_input(x), w), add(x, y)            where the operand of conv2d has fewer bits than a sum:
        ->  z = quantizers.add_x(x)
            conv2d(quantizers.conv_input(z), w), add(z, ...)

One quantizer for each tensor: an integer runtime writes a tensor once, on one grid. Of several quantizers the widest
reads the tensor, and everything else, narrower quantizers too, reads the levels of that one.

Sums: one float operand keeps the layers around a sum in float. A sum with a constant, a broadcast one and one of
integers are left alone, as no two paths join there.

Functions: the kernel of a convolution returns codes, and a function of each element is then a table of 256. A clamp
needs no table, as its kernel does it; linear layers return floats as well.

Shared results: where a result of a convolution is pooled, moved or concatenated, and read by something else besides,
one quantizer at the result tells the convolution one grid for all readers (branches of GoogLeNet, halves of ShuffleNet,
the skips of a U-Net). Only where a quantizer reads it in the end. Where nothing but equal quantizers of whole tensors
do, seen through what selects, the first of them takes their place: the others would round its levels once more. Grids
of integers are monotone and hold zero, so max(q(x)) = q(max(x)), and rounding before a move is rounding after it.

Config.residual_bits asks for this pass; by default it does not run.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from torch import Tensor, fx

from octav_fx.clips.learned import LEARNED
from octav_fx.compat.graphs import ENTER_AUTOCAST
from octav_fx.formats.granularity import TENSOR
from octav_fx.formats.grid import Grid
from octav_fx.ir.aliasing import Aliasing, aliasing
from octav_fx.ir.arguments import arguments, called_module, module_input, operand_of, set_operand
from octav_fx.ir.clamps import clamp_bounds
from octav_fx.ir.dataflow import readers, state_only, tensor_flow
from octav_fx.ir.edits import Edit, site_of
from octav_fx.ir.meta import fake, info, set_fake, update
from octav_fx.ir.movement import selects
from octav_fx.ir.op import Op, Operand, Role, Trait, activation
from octav_fx.ir.ops import is_op, op_of
from octav_fx.ir.pools import axes_of_mean
from octav_fx.ir.signedness import nonnegative
from octav_fx.ir.sites import in_scope, numbered
from octav_fx.ir.table.layers import BATCH_NORM
from octav_fx.nn import FakeQuantizer
from octav_fx.passes.prepare.quantize_operands import Choose, Place, add_quantizer

_SUM: Final = (activation(0, "x"), activation(1, "y"))
_ONE: Final = (activation(0, "x"),)
# Ops that return elements of their input, besides those that selects() knows.
_SELECTS: Final = ("pixel_shuffle", "chunk", "getitem", "identity", "dropout")
# Ops that return elements of several inputs, or means of them.
_MIXES: Final = ("cat", "avg_pool", "interpolate")


def quantize_residuals(gm: fx.GraphModule, choose: Choose) -> list[Edit]:
    """See the module's docstring."""
    edits: list[Edit] = []
    constant, unsigned = state_only(tensor_flow(gm.graph)), nonnegative(gm.graph)
    of_convolutions, memory = _of_convolutions(gm.graph, constant), aliasing(gm.graph)
    for node in list(gm.graph.nodes):
        op = op_of(node)
        if op is None or info(node).op is not None:
            continue
        _by_position(node, op, len(_SUM if op.name == "add" else _ONE))
        operands = _operands(node, constant) or _shares(node, of_convolutions)
        if not operands:
            continue
        update(node, site=_site(node, gm.graph), op=_row(op, operands))
        edits += [
            _quantize(gm, node, operand, unsigned, memory, choose)
            for operand in operands
            if _quantizer(operand_of(node, operand)) is None
        ]
    return edits


def _row(op: Op, operands: tuple[Operand, ...]) -> Op:
    """Return a row with operands, as a user's function has, which puts a node into tables."""
    named = {operand.index: operand.name for operand in operands if operand.part is None}
    names = {name: named.get(i, name) for i, name in enumerate(op.parameters)}
    return Op(
        op.name,
        operands,
        parameters={names[name]: default for name, default in op.parameters.items()},
        aliases={word: names[name] for word, name in op.keywords.items() if word != "self"},
        traits=op.traits,
        nonnegative=op.nonnegative,
    )


def _by_position(node: fx.Node, op: Op, count: int) -> None:
    """Write the first arguments of a call by their positions: torch.add(input=x, other=y)."""
    missing = list(op.parameters)[len(node.args) : count]
    given = {op.keywords.get(word): word for word in node.kwargs}
    if missing and given.keys() >= {*missing}:
        node.args = (*node.args, *(node.kwargs[given[name]] for name in missing))
        node.kwargs = {word: value for word, value in node.kwargs.items() if op.keywords.get(word) not in missing}


def _operands(node: fx.Node, constant: set[fx.Node]) -> tuple[Operand, ...]:
    """Return the operands of a join of two paths, a global pool or a function of a convolution; else none."""
    if axes_of_mean(node) is not None or _is_function_of_convolution(node):
        return _ONE
    if not is_op(node, "add") or len(node.args) != 2 or node.kwargs:
        return ()
    values = [fake(source) for source in node.args if isinstance(source, fx.Node)]
    if not all(isinstance(value, Tensor) and value.is_floating_point() for value in values):
        return ()
    joins = len(values) == 2 and values[0].shape == values[1].shape and constant.isdisjoint(node.all_input_nodes)
    return _SUM if joins else ()


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


def _shares(node: fx.Node, of_convolutions: set[fx.Node]) -> tuple[Operand, ...]:
    """Return those operands of a pool, a move or a concatenation that other nodes read, too: see _is_shared."""
    if not _moves(node) or not node.args:
        return ()
    operands: tuple[Operand, ...] = _ONE
    if isinstance(parts := operand_of(node, *_ONE), (list, tuple)):
        operands = tuple(Operand(0, f"x{i}", Role.ACTIVATION, part=i) for i in range(len(parts)))
    return tuple(operand for operand in operands if _is_shared(operand_of(node, operand), of_convolutions))


def _is_shared(value: Any, of_convolutions: set[fx.Node]) -> bool:
    """Tell whether a value is made of results of convolutions, several nodes read it, and in the end a quantizer does.

    What was selected out of a quantized tensor is none: its elements are levels already.
    """
    source = module_input(value) if _quantizer(value) is not None else value
    known = fake(value)
    is_float = isinstance(known, Tensor) and known.is_floating_point()
    if source not in of_convolutions or not is_float or len(_parts(value)) < 2:
        return False
    while _selects(source) and source.args:
        source = operand_of(source, *_ONE)
        if _quantizer(source) is not None:
            return False
    return any(_quantizer(end) is not None for end in _ends(value))


def _of_convolutions(graph: fx.Graph, constant: set[fx.Node]) -> set[fx.Node]:
    """Return the results of convolutions, and what is pooled, moved, concatenated or computed by element of them."""
    found = set[fx.Node]()
    for node in graph.nodes:
        op, sources = op_of(node), [source for source in node.all_input_nodes if source not in constant]
        if op is None or not sources:
            continue
        is_pointwise = Trait.POINTWISE in op.traits and found.issuperset(sources)
        is_like_its_input = (_moves(node) or op is BATCH_NORM) and not found.isdisjoint(sources)
        if op.spatial or is_pointwise or is_like_its_input:
            found.add(node)
    return found


def _selects(node: fx.Node) -> bool:
    return selects(node) or is_op(node, *_SELECTS)


def _moves(node: fx.Node) -> bool:
    return _selects(node) or is_op(node, *_MIXES)


def _parts(node: fx.Node) -> list[fx.Node]:
    """Return what reads a value; in place of a chunk() of it, what reads one of the parts."""
    parts = [part for reader in readers(node) for part in (readers(reader) if is_op(reader, "chunk") else [reader])]
    # A move of which only sizes are read does not count.
    return [part for part in parts if not _moves(part) or _ends(part)]


def _ends(node: fx.Node, through: Callable[[fx.Node], bool] = _moves) -> set[fx.Node]:
    """Return the nodes that compute with a value, seen through pools, moves and concatenations of it, or as asked."""
    found, seen, waiting = set[fx.Node](), set[fx.Node](), [node]
    while waiting:
        for reader in readers(waiting.pop()):
            if not through(reader):
                found.add(reader)
            elif reader not in seen:
                seen.add(reader)
                waiting.append(reader)
    return found


def _quantize(
    gm: fx.GraphModule, node: fx.Node, operand: Operand, unsigned: set[fx.Node], memory: Aliasing, choose: Choose
) -> Edit:
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
        pooled=axes_of_mean(node) is not None,
        shape=tuple(fake(value).shape),
    )
    settings = choose(place)
    if isinstance(settings, str):
        return Edit.by_config(node, settings, operand.name)
    # Into levels of it, which nobody else would see. Either operand: x.add_(x) writes into both.
    if memory.is_written_by(value, node) and memory.is_read_after(value, node):
        return Edit.unsupported(node, f"{value.name} is read after the sum has been written into it", operand.name)
    # The write of the node itself is fine: what it writes are levels.
    if memory.written(value, after=value, before=node) or memory.written(value, after=node):
        return Edit.unsupported(node, f"{value.name} is written in place by another node", operand.name)
    if (ends := _alike(value, place, unsigned, choose)) is not None:
        return _lift(node, operand, value, ends)
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


def _alike(value: fx.Node, place: Place, unsigned: set[fx.Node], choose: Choose) -> list[fx.Node] | None:
    """Return the quantizers that read a value, seen through what selects, where one can stand for all; else None.

    Not where a clip is learned, which would be another parameter, nor in a graph with regions of autocast: data is
    rounded in the dtype of its region. Not where the place of the value has an override of its own.
    """
    ends = sorted(_ends(value, selects))
    found = {None if (quantizer := _quantizer(end)) is None else quantizer.settings for end in ends}
    settings = next(iter(found), None)
    if len(ends) < 2 or len(found) > 1 or settings is None:
        return None
    spec = settings.spec
    is_plain = isinstance(spec.format, Grid) and spec.granularity == TENSOR and settings.method not in LEARNED
    is_in_range = spec.format.signed or value in unsigned
    is_usual = choose(replace(place, residual=False)) == settings if is_plain else False
    has_regions = bool(value.graph.find_nodes(op="call_function", target=ENTER_AUTOCAST))
    return ends if is_plain and is_in_range and is_usual and not has_regions else None


def _lift(node: fx.Node, operand: Operand, value: fx.Node, ends: list[fx.Node]) -> Edit:
    """Put the first of the quantizers that read a value behind it, in place of them all."""
    lifted, *others = ends
    for end in ends:
        end.replace_all_uses_with(module_input(end))
    for end in others:
        value.graph.erase_node(end)
    value.append(lifted)
    lifted.args = (value,)
    set_fake(lifted, fake(value))
    value.replace_all_uses_with(lifted, delete_user_cb=lambda reader: reader is not lifted)
    quantizer = _quantizer(lifted)
    assert quantizer is not None
    return Edit(site_of(node), "quantize", quantizer.spec.format.label, operand.name)


def _quantizer(node: Any) -> FakeQuantizer | None:
    module = called_module(node)
    return module if isinstance(module, FakeQuantizer) else None


def _site(node: fx.Node, graph: fx.Graph) -> str:
    """Return the module's path, else that of the enclosing module with the op's name; further calls are numbered."""
    op = op_of(node)
    assert op is not None
    base = str(node.target) if node.op == "call_module" else in_scope(node, op.name)
    return numbered(base, {site_of(other) for other in graph.nodes if other is not node})
