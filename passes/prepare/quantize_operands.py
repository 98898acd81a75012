"""Put a fake-quantizer before every operand that the row of its op names.

    conv2d(x, w, b, ...)  ->  conv2d(quantizers.site_input(x), quantizers.site_weight(w), b, ...)
    matmul(x, y)          ->  matmul(quantizers.site_input(x), quantizers.site_other(y))

A value that is computed from parameters alone is a weight wherever a row allows both: signed, one clip per output
channel. An activation gets one clip, on an unsigned grid if it cannot be negative. A product of constants stays as it
is. What stays float is an edit with its reason, whether its row, the configuration or a missing row decided it.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from octav_fx.capture.symbolic.regions import Kept, apply_function
from octav_fx.errors import NotCaptured, OctavError
from octav_fx.ir.arguments import operand_of, operands_of, set_operand
from octav_fx.ir.dataflow import ancestors, constants, downstream, is_value_source, state_only, tensor_flow
from octav_fx.ir.edits import Edit, site_of
from octav_fx.ir.first_last import first_and_last_layers
from octav_fx.ir.meta import fake, info, set_fake
from octav_fx.ir.movement import quantizer_before
from octav_fx.ir.op import Op, Operand, Role
from octav_fx.ir.ops import module_of, op_of
from octav_fx.ir.signedness import nonnegative
from octav_fx.nn import FakeQuantizer, Settings
from octav_fx.nn.fake_quantizer import QUANTIZERS


@dataclass(frozen=True, slots=True)
class Place:
    """Everything about one operand that decides how it is quantized."""

    site: str
    op: str
    operand: str
    # WEIGHT or ACTIVATION.
    role: Role
    # One of the first convolutions or last linear layers.
    edge: bool
    signed: bool
    # The channel axis, counted from the front; None: per tensor.
    dim: int | None
    # What quantize_residuals asks for.
    residual: bool = False
    # The input of a global pool.
    pooled: bool = False
    # The axis that products are summed over, counted from the front; None: there is no one axis.
    reduction: int | None = None
    shape: tuple[int, ...] = ()


# A Settings, or the reason why the operand stays float.
Choose = Callable[[Place], Settings | str]


def quantize_operands(gm: fx.GraphModule, choose: Choose) -> list[Edit]:
    """See the module's docstring."""
    edits: list[Edit] = []
    flow = tensor_flow(gm.graph)
    parameters, edges, unsigned = state_only(flow), first_and_last_layers(flow), nonnegative(gm.graph)
    known = constants(gm.graph)
    sources = [node for node in flow if is_value_source(node, gm)]
    valued = {*sources, *downstream(flow, sources)}
    for node in list(gm.graph.nodes):
        op, operands = op_of(node), operands_of(node)
        if op is None or not op.operands:
            if info(node).macs:
                edits.append(Edit.unsupported(node, f"no rule for {_kind(node)}"))
            continue
        if node.target is not op.target or ("out" in node.kwargs and info(node).op is None):
            # canonicalize has said why.
            continue
        if reason := _no_grid_for(operand_of(node, operand) for operand in operands):
            edits.append(Edit.unsupported(node, reason))
            continue
        if node not in valued and all(_is_floating(operand_of(node, operand)) for operand in operands):
            # Rotary embeddings multiply positions by frequencies: rounded, positions would be others.
            reason = "computed from integers and constants, nothing is learned or measured here"
            edits.append(Edit.unsupported(node, reason))
            continue
        for operand in operands:
            value = operand_of(node, operand)
            if quantizer_before(value, node) is not None:
                continue
            place = _place(node, op, operand, value, value in parameters, node in edges, value not in unsigned)
            choice = choose(place)
            if isinstance(choice, str):
                edits.append(Edit.by_config(node, choice, operand.name))
                continue
            _check_floating(place, value)
            with gm.graph.inserting_before(node):
                quantizer = gm.graph.call_module(
                    add_quantizer(gm, place, choice, value, running=value not in known), (value,)
                )
            set_fake(quantizer, fake(value))
            set_operand(node, operand, quantizer)
            edits.append(Edit(place.site, "quantize", choice.spec.format.label, operand.name))
    return edits


def _value(argument: Any) -> Any:
    return fake(argument) if isinstance(argument, fx.Node) else argument


def _is_floating(argument: Any) -> bool:
    value = _value(argument)
    return isinstance(value, Tensor) and value.is_floating_point()


def _no_grid_for(operands: Iterable[Any]) -> str | None:
    """Return why operands of this kind stay as they are, or None."""
    values = [value for value in map(_value, operands) if isinstance(value, Tensor)]
    if any(value.is_complex() for value in values):
        return "its operands are complex"
    return "one of its operands is sparse" if any(value.layout is not torch.strided for value in values) else None


def _place(node: fx.Node, op: Op, operand: Operand, read: Any, is_static: bool, edge: bool, signed: bool) -> Place:
    site, value = site_of(node), _value(read)
    if not isinstance(value, Tensor):
        since = f", since {_unknown_since(read)}" if isinstance(read, fx.Node) else ""
        raise NotCaptured(f"{site}: {operand.name} is {value!r}, not a tensor whose shape is known at capture{since}")
    is_weight = operand.role is Role.WEIGHT or (operand.role is Role.EITHER and is_static)
    # A vector has no channel axis besides the one that is summed over.
    channel = operand.channel if is_weight and value.dim() > 1 else None
    return Place(
        site=site,
        op=op.name,
        operand=operand.name,
        role=Role.WEIGHT if is_weight else Role.ACTIVATION,
        edge=edge,
        signed=signed or is_weight,
        dim=None if channel is None else channel % value.dim(),
        reduction=_reduction_axis(op, operand, value.dim()),
        shape=tuple(value.shape),
    )


def _reduction_axis(op: Op, operand: Operand, dims: int) -> int | None:
    # The input of a convolution without a batch axis.
    if op.spatial and operand.role is Role.ACTIVATION and dims == op.spatial + 1:
        return 0
    return operand.reduction_axis(dims)


def _unknown_since(node: fx.Node) -> str:
    """Return the line of the user's code that asked for data."""
    return next((since for source in ancestors(node) if (since := info(source).unknown_since) is not None), "?")


def _check_floating(place: Place, read: fx.Node) -> None:
    value = fake(read)
    if not value.is_floating_point():
        raise OctavError(
            f"{place.site}: {place.operand} has dtype {value.dtype} and shape {tuple(value.shape)}, only floating "
            "point can be quantized; convert it in the model, or leave it float with "
            f"overrides={{{place.site!r}: None}}"
        )


def add_quantizer(gm: fx.GraphModule, place: Place, settings: Settings, read: fx.Node, *, running: bool) -> str:
    """Put a quantizer into the tree and return its path; the graph of the other mode may have an equal one there."""
    quantizers = gm.get_submodule(QUANTIZERS)
    value = fake(read)
    shared = settings.spec.granularity
    # A clip for each row of data is none for the next batch.
    shape = () if running and shared.is_short else settings.spec.clip_shape(value.shape)
    base = f"{place.site}_{place.operand}".replace(".", "_").replace(":", "_")
    name, count = base, 0
    while hasattr(quantizers, name):
        existing, path = getattr(quantizers, name), f"{QUANTIZERS}.{name}"
        same = existing.settings == settings and existing.hint.shape == shape
        if same and existing.running is running and not gm.graph.find_nodes(op="call_module", target=path):
            return path
        count += 1
        name = f"{base}_{count}"
    quantizer = FakeQuantizer(settings, shape, value.device, running=running)
    quantizers.add_module(name, quantizer.train(gm.training))
    return f"{QUANTIZERS}.{name}"


def _kind(node: fx.Node) -> str:
    if node.op == "call_module":
        return type(module_of(node)).__name__
    if node.target is apply_function:
        return next(kept.function.__name__ for kept in map(fake, node.all_input_nodes) if isinstance(kept, Kept))
    return str(getattr(node.target, "__name__", node.target))


def remove_unused(gm: fx.GraphModule, graphs: list[fx.Graph], but: Collection[str] = ()) -> None:
    """Drop the quantizers that no graph calls any more; but: the names of those that stay anyhow."""
    used = {node.target for graph in graphs for node in graph.nodes if node.op == "call_module"}
    quantizers: nn.Module = gm.get_submodule(QUANTIZERS)
    for name, _ in list(quantizers.named_children()):
        if name not in but and f"{QUANTIZERS}.{name}" not in used:
            delattr(quantizers, name)
