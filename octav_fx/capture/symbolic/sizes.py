"""Sizes that are those of another value: what a check on a size has to compute gets small, most often nothing.

linear(relu(x), w).size(0)  ->  x.size(0)        x.view(b, t, -1).size(1)  ->  t        x.unbind(1) has x.size(1) pieces
"""

import operator
from typing import Any, Final

from torch import Tensor, fx, nn
from torch.nn import functional as F

from octav_fx.compat.tensors import TORCH_GROUPED_MM
from octav_fx.ir.dataflow import reads_sizes
from octav_fx.ir.meta import fake, set_fake
from octav_fx.ir.ops import in_place, module_of

# Functions and methods whose result has the shape of their first input.
_SAME: Final = frozenset(
    {
        *("relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "hardswish", "hardsigmoid"),
        *("hardtanh", "softplus", "tanh", "sigmoid", "softmax", "log_softmax", "dropout", "alpha_dropout", "clamp"),
        *("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "normalize", "contiguous", "clone"),
        *("detach", "float", "half", "bfloat16", "double", "long", "int", "bool", "cumsum", "roll", "flip"),
        *("abs", "exp", "log", "sqrt", "rsqrt", "square", "sin", "cos", "neg", "pow", "reciprocal", "round", "floor"),
        *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "triu", "tril"),
    }
)
_SAME_MODULES: Final = (
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d),
    *(nn.InstanceNorm2d, nn.InstanceNorm3d, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.ReLU6),
    *(nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.LeakyReLU, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Tanh),
    *(nn.Sigmoid, nn.Softmax, nn.Softplus, nn.Identity),
)
# In place, and of another shape afterwards.
RESHAPES_IN_PLACE: Final = frozenset(
    {
        *("resize_", "resize_as_", "set_", "as_strided_", "t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_"),
        "unsqueeze_",
    }
)
_SPLITS: Final = ("unbind",)
_BROADCASTING: Final = frozenset({"add", "sub", "mul", "truediv", "div", "pow", "maximum", "minimum"})

_REDUCTIONS: Final = frozenset({"mean", "sum", "amax", "amin", "var", "std", "logsumexp", "norm"})


# A value and an axis of it; or a size itself, and None.
_Place = tuple[Any, int | None]
# By value and axis, the earliest that has its size: sums of sums lead to one place in as many ways as there are paths.
_Known = dict[tuple[fx.Node, int], _Place]


def forward_sizes(graph: fx.Graph) -> None:
    """Let each node that reads a size read it of the earliest value that has it."""
    known: _Known = {}
    for node in list(graph.nodes):
        if len(node.args) == 0 or not isinstance(node.args[0], fx.Node):
            continue
        read = node.args[0]
        if reads_sizes(node):
            node.args = (_same_shape(read), *node.args[1:])
        elif node.target is len and isinstance(fake(read), Tensor):
            node.args = (_same_shape(read),)
        elif node.target is len and _name(read) in _SPLITS:
            _replace_by_size(graph, node, read, known)
        if (found := _axis_read(node)) is not None:
            _forward_axis(graph, node, *found, known)


def _same_shape(node: fx.Node) -> fx.Node:
    """Return the earliest value with the shape of a node, as far as ops say."""
    while keeps_shape(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def keeps_shape(node: fx.Node) -> bool:
    """Tell whether a node has the shape of its first input."""
    if node.op == "call_module":
        return isinstance(module_of(node), _SAME_MODULES)
    name = _name(node)
    if name == "to" or (node.op == "call_method" and name == "type"):
        return not any(isinstance(arg, fx.Node) and isinstance(fake(arg), Tensor) for arg in node.args[1:])
    if name == "pow" and len(node.args) > 1 and isinstance(node.args[1], fx.Node):
        return False
    is_written = in_place(node) and "out" not in node.kwargs and name not in RESHAPES_IN_PLACE
    return name in _SAME or (is_written and isinstance(fake(node), Tensor))


def _axis_read(node: fx.Node) -> tuple[fx.Node, int] | None:
    """Return the tensor and the axis, counted from the front, whose size a node is; None for any other node."""
    if node.op == "call_method" and node.target == "size" and len(node.args) == 2:
        tensor, axis = node.args
        is_axis = isinstance(tensor, fx.Node) and isinstance(axis, int) and isinstance(fake(tensor), Tensor)
        return (tensor, axis % max(fake(tensor).dim(), 1)) if is_axis else None  # type: ignore[arg-type, return-value]
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int):
        tensor, axis = _element(node.args[0], node.args[1]) or (None, None)
        return None if axis is None else (tensor, axis)  # type: ignore[return-value]
    return None


def _element(sizes: Any, index: int) -> tuple[Any, int | None] | None:
    """Return the tensor and axis whose size is an element of a tuple of sizes, or the element itself and None."""
    if isinstance(sizes, (list, tuple)):
        return (sizes[index], None) if -len(sizes) <= index < len(sizes) else None
    if not isinstance(sizes, fx.Node) or not isinstance(fake(sizes), tuple):
        return None
    length, of = len(fake(sizes)), sizes.args[0] if sizes.args else None
    index %= length
    if sizes.target is getattr or (sizes.op == "call_method" and sizes.target == "size" and len(sizes.args) == 1):
        return (of, index) if isinstance(of, fx.Node) and isinstance(fake(of), Tensor) else None
    if sizes.target is operator.getitem and isinstance(part := sizes.args[1], slice):
        bounds = (part.start, part.stop, part.step)
        if any(isinstance(bound, fx.Node) for bound in bounds) or not isinstance(of, fx.Node):
            return None
        return _element(of, range(len(fake(of)))[part][index])
    if sizes.target is operator.add:
        one, two = sizes.args
        first = len(fake(one)) if isinstance(one, fx.Node) else len(one)  # type: ignore[arg-type]
        return _element(one, index) if index < first else _element(two, index - first)
    return None


def _forward_axis(graph: fx.Graph, node: fx.Node, tensor: fx.Node, axis: int, known: _Known) -> None:
    """Replace a node that is the size of an axis by an equal one of an earlier value."""
    found, at = _earliest(tensor, axis, known)
    if at is None:
        node.replace_all_uses_with(found)
    elif found is not tensor or node.target is operator.getitem:
        _replace(graph, node, found, at)


def _earliest(tensor: fx.Node, axis: int, known: _Known) -> _Place:
    """Return the earliest value and its axis with the size of this one's, as far as ops say; or the size, and None."""
    if (tensor, axis) not in known:
        known[tensor, axis] = _found(tensor, axis, known)
    return known[tensor, axis]


def _found(tensor: fx.Node, axis: int, known: _Known) -> _Place:
    tensor = _same_shape(tensor)
    earlier = _earlier(tensor, axis, known)
    if earlier is None:
        return tensor, axis
    found, at = earlier
    if at is None:
        read = _axis_read(found)
        if read is None:
            return found, None
        found, at = read
    return _earliest(found, at, known)


def _earlier(node: fx.Node, axis: int, known: _Known) -> _Place | None:
    """Return a value and its axis that has the size of this one's; or a node that is the size, and None."""
    name, args = _name(node), node.args
    first = args[0] if args and isinstance(args[0], fx.Node) else None
    if first is None or not isinstance(fake(first), Tensor) or not isinstance(fake(node), Tensor):
        return None
    last = fake(node).dim() - 1
    module = module_of(node) if node.op == "call_module" else None
    if node.target in (F.linear, F.embedding) or isinstance(module, (nn.Linear, nn.Embedding)):
        return (first, axis) if axis < last else None
    if node.target in (F.grouped_mm, TORCH_GROUPED_MM):
        # Two matrices give one for each group.
        return (first, axis) if axis < last and fake(first).dim() == last + 1 else None
    if name in ("transpose", "swapaxes") and all(isinstance(a, int) for a in args[1:3]) and len(args) == 3:
        one, two = (int(a) % (last + 1) for a in args[1:3])  # type: ignore[arg-type]
        return first, {one: two, two: one}.get(axis, axis)
    if name == "permute":
        order = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
        return (first, int(order[axis]) % (last + 1)) if all(isinstance(a, int) for a in order) else None  # type: ignore[arg-type]
    if name in ("view", "reshape"):
        sizes = args[1] if isinstance(_value(args[1]), (list, tuple)) else args[1:]
        size = _element(sizes, axis)
        return size if size is not None and isinstance(size[0], fx.Node) else None
    if name == "unsqueeze" and isinstance(args[1], int) and (at := args[1] % (last + 1)) != axis:
        return first, axis - (axis > at)
    if name in _BROADCASTING and len(args) > 1:
        return _of_both(first, args[1], axis, last, known)
    if name in _REDUCTIONS and node.kwargs.get("keepdim") is True:
        axes = args[1] if len(args) > 1 else node.kwargs.get("dim")
        axes = axes if isinstance(axes, (list, tuple)) else (axes,)
        is_kept = all(isinstance(a, int) and a % (last + 1) != axis for a in axes)
        return (first, axis) if is_kept else None
    if node.target is F.scaled_dot_product_attention:
        return (first, axis) if axis in (last - 1, 0) else None
    return None


def _of_both(one: fx.Node, two: Any, axis: int, last: int, known: _Known) -> _Place | None:
    """Return where the size of a sum or product comes from, if that is the same place for both sides."""
    other = _value(two)
    if not isinstance(other, Tensor):
        return one, axis
    missing = last + 1 - fake(one).dim(), last + 1 - other.dim()
    if axis < missing[1]:
        return one, axis - missing[0]
    if axis < missing[0]:
        return two, axis - missing[1]
    sides = _earliest(one, axis - missing[0], known), _earliest(two, axis - missing[1], known)
    return sides[0] if sides[0] == sides[1] else None


def _value(argument: Any) -> Any:
    """Return the value of an argument for the example inputs, whether it is a node or not."""
    return fake(argument) if isinstance(argument, fx.Node) else argument


def _replace_by_size(graph: fx.Graph, node: fx.Node, pieces: fx.Node, known: _Known) -> None:
    tensor = pieces.args[0]
    axis = pieces.args[1] if len(pieces.args) > 1 else pieces.kwargs.get("dim", 0)
    if isinstance(tensor, fx.Node) and isinstance(axis, int):
        new = _replace(graph, node, tensor, axis % fake(tensor).dim())
        if (found := _axis_read(new)) is not None:
            _forward_axis(graph, new, *found, known)


def _replace(graph: fx.Graph, node: fx.Node, tensor: fx.Node, axis: int) -> fx.Node:
    with graph.inserting_before(node):
        new = graph.call_method("size", (tensor, axis))
    set_fake(new, fake(node))
    node.replace_all_uses_with(new)
    return new


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""
