"""Answer from the saved codes what gradients ask about a value, so that backward needs neither it nor a mask of it.

On the joint graph of forward and backward, as save_codes leaves it, where g is the gradient of y:

    codes = quantize(x, clip)                          codes = quantize(x, clip)
    y     = dequantize(codes, clip)                    y     = dequantize(codes, clip)
    dx    = fake_quantize_backward(g, x, clip)    ->   dx    = where(codes mean outside, 0, g)

    x <= 0  or  x >= ceiling                      ->   codes < 0  or  codes raised      (gradients of relu and relu6)

The piecewise-linear gradient passes where x lies within the clip, and codes say by themselves which values do not:
quantize gives those a code beyond the grid's. On an unsigned grid zero itself has a code of its own, low - 1, and a
value that has reached the ceiling of a clamp is raised by grid.ceiling_flag.

Two masks in a row, that of the quantizer and that of the activation before it, become one: pass where the code is one
of the grid's.

    reshape(permute(where(outside(codes), 0, g)))  ->  where(outside(reshape(permute(codes))), 0, reshape(permute(g)))

Gradients of the heads of attention are put together again behind their masks. There Inductor would write the mask's
result in one order, and copy it into the other for the matmul that reads it: views of codes and g are free.
"""

import torch
from torch import fx

from octav_fx.compat.tensors import OpOverload
from octav_fx.formats.format import Format
from octav_fx.formats.spec import spec_of
from octav_fx.ir.calls import Arguments, arguments_of, insert_call, update_arguments
from octav_fx.ir.edits import Edit, insert_aten
from octav_fx.ir.joint import CONVERT, COPIES, backward_of, closure, gradients_of, origin, replace
from octav_fx.ir.meta import fake

octav, aten = torch.ops.octav, torch.ops.aten

_PERMUTATIONS = frozenset({aten.permute.default, aten.transpose.int, aten.t.default})
_RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})


def mask_from_codes(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    backward = backward_of(gm.graph)
    edits = []
    for levels in gm.graph.find_nodes(op="call_function", target=octav.dequantize.default):
        codes = arguments_of(levels).codes
        if codes.target is not octav.quantize.default:
            continue
        call = arguments_of(codes)
        gradients = [node for node in gradients_of(codes) if arguments_of(node).gradient == "pwl"]
        masked = [_mask(gradient, codes) for gradient in gradients]
        answers = set() if _grid(call).signed else _answer(codes, backward)
        for mask, read in masked:
            _merge(mask, read, call, answers)
        if masked or answers:
            edits.append(Edit(str(call.x), "mask from codes", f"{len(masked)} of the clip, {len(answers)} of relu"))
    return edits


def _grid(call: Arguments) -> Format:
    return spec_of(call.spec).format


def _mask(gradient: fx.Node, codes: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Replace the gradient of a fake-quantizer by one that reads its codes; Inductor fuses it with its neighbours.

    Return it, and the codes as it reads them.
    """
    graph, call = gradient.graph, arguments_of(codes)
    grid, grad = _grid(call), arguments_of(gradient).grad
    views = _order_behind(gradient)
    *between, last = gradient, *views
    with graph.inserting_before(last):
        for view in views:
            grad, codes = (_viewed(node, view) for node in (grad, codes))
        value = fake(grad)
        code = _number(codes)
        outside = _outside(code, grid.low if grid.signed else grid.low - 1, grid.high)
        if call.ceiling is not None:
            beyond = _outside(code, grid.ceiling_flag, grid.ceiling_flag + grid.high)
            outside = insert_aten(graph, aten.bitwise_and.Tensor, outside, beyond)
        zero = insert_aten(graph, aten.full.default, [], 0.0, dtype=value.dtype, device=value.device)
        masked = insert_aten(graph, aten.where.self, outside, zero, grad)
    replace(last, masked)
    for node in reversed(between):
        graph.erase_node(node)
    return masked, codes


def _order_behind(node: fx.Node) -> list[fx.Node]:
    """Return the views behind a node, each read by the next one alone, if they put its elements in another order."""
    views: list[fx.Node] = []
    while len(node.users) == 1 and (reader := next(iter(node.users))).target in _PERMUTATIONS | _RESHAPES:
        views.append(reader)
        node = reader
    return views if any(view.target in _PERMUTATIONS for view in views) else []


def _answer(codes: fx.Node, backward: set[fx.Node]) -> set[fx.Node]:
    """Let codes answer where their value is at a bound, which the gradients of relu and relu6 ask; return the answers.

    So neither the value, nor what it was computed from, nor a mask has to be there in backward.
    """
    graph, call = codes.graph, arguments_of(codes)
    flag, value = _grid(call).ceiling_flag, origin(call.x, COPIES)
    if call.ceiling is not None:
        # relu6 asks about what goes into it: at or beyond its bounds there is at its bounds here.
        value = origin(arguments_of(arguments_of(value)["self"])["self"], COPIES)
    answers: set[fx.Node] = set()
    for question in [user for same in closure(value, COPIES) for user in same.users]:
        at_zero = question.target is aten.le.Scalar and arguments_of(question).other == 0
        at_ceiling = question.target is aten.ge.Scalar and arguments_of(question).other == call.ceiling
        if (at_zero or at_ceiling) and _is_for_backward(question, backward):
            with graph.inserting_before(question):
                code = _number(codes)
                comparison, bound = (aten.lt.Scalar, 0) if at_zero else (aten.ge.Scalar, flag)
                answer = insert_aten(graph, comparison, code, bound)
            replace(question, answer)
            answers.add(answer)
    return answers


def _is_for_backward(question: fx.Node, backward: set[fx.Node]) -> bool:
    """Return whether only gradients ask: what the model itself asks may come before the codes."""
    readers = [r for user in question.users for r in (user.users if user.target is aten.bitwise_or.Tensor else [user])]
    return backward.issuperset(readers)


def _merge(masked: fx.Node, codes: fx.Node, call: Arguments, answers: set[fx.Node]) -> None:
    """Make one mask of two in a row, of the activation after that of its quantizer: pass where 0 <= code <= high."""
    graph = masked.graph
    reader = next(iter(masked.users), None)
    if reader is None or len(masked.users) > 1 or reader.target is not aten.where.self:
        return
    outer = arguments_of(reader)
    condition: fx.Node = outer.condition
    # relu6 asks about both of its bounds.
    is_pair = call.ceiling is not None
    parts = set(condition.all_input_nodes) if is_pair else {condition}
    if outer.other is not masked or len(parts) != 1 + is_pair or not parts <= answers:
        return
    with graph.inserting_before(reader):
        outside = _outside(_number(codes), 0, _grid(call).high)
    update_arguments(reader, condition=outside, other=arguments_of(masked).other)
    graph.erase_node(masked)


def _viewed(node: fx.Node, view: fx.Node) -> fx.Node:
    """Return what a view makes of another node of the same shape."""
    call, target = arguments_of(view), view.target
    if isinstance(target, OpOverload) and target in _PERMUTATIONS:
        return insert_call(node.graph, target, call, self=node)
    # The other node may lie in memory in an order of which this is no view.
    shape = call["shape" if target is aten.reshape.default else "size"]
    return insert_aten(node.graph, aten.reshape.default, node, shape)


def _outside(code: fx.Node, low: int, high: int) -> fx.Node:
    """Return whether not low <= code <= high: one comparison, with halves exact in floating point."""
    centred = insert_aten(code.graph, aten.sub.Tensor, code, (low + high) / 2)
    distance = insert_aten(code.graph, aten.abs.default, centred)
    return insert_aten(code.graph, aten.gt.Scalar, distance, (high - low) / 2)


def _number(codes: fx.Node) -> fx.Node:
    """Return the codes as float32."""
    # What Inductor generates on a CPU for comparing bytes, or for a mask of bools, crawls.
    return insert_aten(codes.graph, CONVERT, codes, torch.float32)
