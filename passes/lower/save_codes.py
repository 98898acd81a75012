"""Keep integer codes for backward, or nothing: never the float copy that a fake-quantizer makes.

On the joint graph of forward and backward (aten ops, from AOTAutograd), where g is the gradient of y:

    y, clip = dynamic_fake_quantize(x, hint)          clip  = optimal_clip(x, hint)
    dx      = fake_quantize_backward(g, x, clip)  ->  codes = quantize(x, clip)
                                                      y     = dequantize(codes, clip)     recomputed in backward
                                                      dx    = where(codes mean outside, 0, g)

    x <= 0  or  x >= ceiling                      ->  codes < 0  or  codes raised     (gradients of relu and relu6)

    y, clip = dynamic_fake_quantize(w, hint)      ->  clip  = optimal_clip(w, hint)
                                                      y     = fake_quantize(w, clip)      recomputed in backward

The first form holds one byte for each element, and neither x nor y; the codes say by themselves which values lie
beyond the clip. The second holds nothing: w is an input of the graph (a weight) and there anyway, or its gradient needs
its value (MAD of an activation). dequantize(quantize(x)) is fake_quantize(x), so no value changes.

AOTAutograd would otherwise keep y: it is cheaper to save than to recompute by its own measure.
"""

from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

import octav_fx.ops  # noqa: F401  registers torch.ops.octav
from octav_fx.formats.grid import Grid
from octav_fx.ir.edits import Edit, insert_aten

octav, aten = torch.ops.octav, torch.ops.aten

# They are the value itself; dropout of nothing is a clone.
_SAME = frozenset({aten.alias.default, aten.detach.default, aten.clone.default})
# They show the same values in another shape, layout or dtype, or pad them: who reads them reads the value.
VIEWS = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten.permute.default, aten.expand.default, aten.t.default),
        *(aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims),
        *(aten.slice.Tensor, aten.select.int, aten.constant_pad_nd.default, aten._unsafe_view.default),
        *(*_SAME, aten._to_copy.default, torch.ops.prims.convert_element_type.default),
    }
)


def save_codes(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    graph = gm.graph
    backward = backward_of(graph)
    edits = []
    for node in graph.find_nodes(op="call_function", target=octav.dynamic_fake_quantize.default):
        outputs: dict[Any, fx.Node] = {user.args[1]: user for user in node.users}
        if backward and 0 in outputs:
            edits.append(_rewrite(graph, node, outputs[0], outputs.get(1), backward))
    return edits


def backward_of(graph: fx.Graph) -> set[fx.Node]:
    """Everything that is computed from the gradients of the outputs; empty in an inference graph."""
    found = {node for node in graph.find_nodes(op="placeholder") if "tangents" in str(node.target)}
    for node in graph.nodes:
        if found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def _rewrite(graph: fx.Graph, node: fx.Node, y: fx.Node, clip: fx.Node | None, backward: set[fx.Node]) -> Edit:
    x, hint, bits, signed, dim, method, gradient = node.args
    assert isinstance(x, fx.Node)
    gradients = [user for user in clip.users if user.target is octav.fake_quantize_backward.default] if clip else []
    from_value = _origin(x, VIEWS).op == "placeholder" or (gradient == "mad" and bool(gradients))
    views = _closure(y, VIEWS)
    with graph.inserting_before(node):
        new_clip = insert_aten(graph, octav.optimal_clip.default, x, hint, bits, signed, dim, method)
        if from_value:
            new_y = insert_aten(graph, octav.fake_quantize.default, x, new_clip, bits, signed, dim, gradient)
        else:
            ceiling = None if signed else _ceiling(x)
            codes = insert_aten(graph, octav.quantize.default, x, new_clip, bits, signed, dim, ceiling)
            dtype = x.meta["val"].dtype
            new_y = insert_aten(graph, octav.dequantize.default, codes, new_clip, bits, signed, dim, dtype)
    if not from_value:
        grid = Grid(bits, signed)  # type: ignore[arg-type]
        masked = [_mask(graph, gradient_node, codes, grid, ceiling is not None) for gradient_node in gradients]
        if not signed:
            _ask_codes(graph, x, codes, grid, masked, backward)
    if any(backward.intersection(view.users) for view in views):
        for view in (new_y, *views[1:]):
            # The id says which checkpointed region of the user's a node belongs to; ours are no regions.
            view.meta.update(recompute=CheckpointPolicy.MUST_RECOMPUTE, ac_graph_id=0)
    for old, new in ((y, new_y), (clip, new_clip)):
        if old is not None:
            old.replace_all_uses_with(new)
            graph.erase_node(old)
    graph.erase_node(node)
    return Edit(str(x), "recompute" if from_value else "save codes", f"{bits} bits")


def _origin(node: fx.Node, targets: frozenset[Any]) -> fx.Node:
    """What the node is made of by these targets alone."""
    while node.target in targets:
        (node, *_) = node.all_input_nodes
    return node


def _closure(node: fx.Node, targets: frozenset[Any]) -> list[fx.Node]:
    """The node, and what these targets make of it, and of that, and so on."""
    found = [node]
    for source in found:
        found += [user for user in source.users if user.target in targets and user not in found]
    return found


def _mask(graph: fx.Graph, gradient: fx.Node, codes: fx.Node, grid: Grid, raised: bool) -> fx.Node:
    """Replace the gradient of a fake-quantizer by one that reads its codes; Inductor fuses it with its neighbours."""
    g = gradient.args[0]
    assert isinstance(g, fx.Node)
    value = g.meta["val"]
    with graph.inserting_before(gradient):
        code = _number(graph, codes)
        outside = _outside(graph, code, grid.low if grid.signed else grid.low - 1, grid.high)
        if raised:
            beyond = _outside(graph, code, grid.ceiling_flag, grid.ceiling_flag + grid.high)
            outside = insert_aten(graph, aten.bitwise_and.Tensor, outside, beyond)
        zero = insert_aten(graph, aten.full.default, [], 0.0, dtype=value.dtype, device=value.device)
        masked = insert_aten(graph, aten.where.self, outside, zero, g)
    gradient.replace_all_uses_with(masked)
    graph.erase_node(gradient)
    return masked


def _outside(graph: fx.Graph, code: fx.Node, low: int, high: int) -> fx.Node:
    """Whether not low <= code <= high: one comparison, with halves exact in floating point."""
    centred = insert_aten(graph, aten.sub.Tensor, code, (low + high) / 2)
    return _is(graph, insert_aten(graph, aten.abs.default, centred), aten.gt, (high - low) / 2)


def _ceiling(x: fx.Node) -> float | None:
    """The upper bound of the clamp from 0 (relu6, hardtanh) that x comes from, if it does."""
    top = _origin(x, _SAME)
    bottom = top.args[0] if top.target is aten.clamp_max.default else None
    is_clamp = isinstance(bottom, fx.Node) and bottom.target is aten.clamp_min.default and bottom.args[1] == 0
    bound: Any = top.args[1] if is_clamp else None
    return float(bound) if isinstance(bound, (int, float)) and bound > 0 else None


def _ask_codes(
    graph: fx.Graph, x: fx.Node, codes: fx.Node, grid: Grid, masked: list[fx.Node], backward: set[fx.Node]
) -> None:
    """The gradients of relu and relu6 ask where their result is at a bound; the codes of the result know.

    So neither the result, nor what it was computed from, nor a mask has to be there in backward.
    """
    ceiling, value = _ceiling(x), _origin(x, _SAME)
    if ceiling is not None:
        # relu6 asks about what goes into it: at or beyond its bounds there is at its bounds here.
        value = _origin(value.args[0].args[0], _SAME)  # type: ignore[union-attr, arg-type]
    asked = [user for same in _closure(value, _SAME) for user in same.users]
    answers: set[fx.Node] = set()
    for question in asked:
        at_zero = question.target is aten.le.Scalar and question.args[1] == 0
        at_ceiling = question.target is aten.ge.Scalar and question.args[1] == ceiling
        if (at_zero or at_ceiling) and _is_for_backward(question, backward):
            with graph.inserting_before(question):
                code = _number(graph, codes)
                answer = _is(graph, code, aten.lt, 0) if at_zero else _is(graph, code, aten.ge, grid.ceiling_flag)
            question.replace_all_uses_with(answer)
            graph.erase_node(question)
            answers.add(answer)
    for gradient in masked:
        _merge(graph, gradient, codes, grid, answers, needed=1 if ceiling is None else 2)


def _is_for_backward(question: fx.Node, backward: set[fx.Node]) -> bool:
    """Whether only gradients ask: what the model itself asks may come before its codes, and would come to need them."""
    readers = [r for user in question.users for r in (user.users if user.target is aten.bitwise_or.Tensor else [user])]
    return backward.issuperset(readers)


def _merge(graph: fx.Graph, masked: fx.Node, codes: fx.Node, grid: Grid, answers: set[fx.Node], needed: int) -> None:
    """Two masks in a row, of the activation after that of its quantizer, are one: pass where 0 <= code <= high."""
    reader = next(iter(masked.users), None)
    if reader is None or len(masked.users) > 1 or reader.target is not aten.where.self or reader.args[2] is not masked:
        return
    condition = reader.args[0]
    assert isinstance(condition, fx.Node)
    parts = {condition} if needed == 1 else set(condition.all_input_nodes)
    if len(parts) != needed or not parts <= answers:
        return
    with graph.inserting_before(reader):
        code = _number(graph, codes)
        outside = _outside(graph, code, 0, grid.high)
    reader.args = (outside, reader.args[1], masked.args[2])
    graph.erase_node(masked)


def _is(graph: fx.Graph, code: fx.Node, comparison: Any, other: float) -> fx.Node:
    return insert_aten(graph, comparison.Scalar, code, other)


def _number(graph: fx.Graph, codes: fx.Node) -> fx.Node:
    """The codes as float32: what Inductor generates on a CPU for comparing bytes, or for a mask of bools, crawls."""
    return insert_aten(graph, torch.ops.prims.convert_element_type.default, codes, torch.float32)
