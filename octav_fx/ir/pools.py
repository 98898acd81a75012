"""Questions about pools, pads and upsampling: is it a global mean, are zeros added, is an element repeated."""

from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from octav_fx.ir.arguments import argument, arguments
from octav_fx.ir.ops import is_op, module_of, op_of

_ONE = (1, (1, 1), [1, 1])
_SPATIAL = ((2, 3), (-2, -1))
# nn.ZeroPad2d and its like are subclasses.
_CONSTANT = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)


def axes_of_mean(node: fx.Node) -> tuple[int, int] | None:
    """Return the two axes over which a node takes a global mean, as a pool to one element or as a mean; else None.

    They are the spatial axes of images [N, C, H, W], though the input may have more axes, or fewer.
    """
    op = op_of(node)
    if op is None:
        return None
    if op.name == "mean":
        axes = argument(node, "dim")
        return next((two for two in _SPATIAL if isinstance(axes, (tuple, list)) and tuple(axes) == two), None)
    is_pool = op.name == "adaptive_avg_pool" and _is_planar(node) and argument(node, "output_size") in _ONE
    return _SPATIAL[1] if is_pool else None


def keeps_axes(node: fx.Node) -> bool:
    """Tell whether a global mean leaves the axes that it averages, with one element each."""
    op = op_of(node)
    return op is None or op.name != "mean" or bool(argument(node, "keepdim"))


def _is_planar(node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(module_of(node)).__name__.endswith("2d")
    return node.target is F.adaptive_avg_pool2d


def max_window(node: fx.Node) -> tuple[Any, ...] | None:
    """Return sizes, strides, paddings and dilations of a 2d max pool, two of each, and ceil_mode; else None."""
    is_planar = type(module_of(node)) is nn.MaxPool2d if node.op == "call_module" else node.target is F.max_pool2d
    if not is_planar:
        return None
    given = arguments(node)
    sizes = [given["kernel_size"], given["stride"] or given["kernel_size"], given["padding"], given["dilation"]]
    if given["return_indices"] or any(isinstance(size, fx.Node) for size in sizes):
        return None
    return (*([size, size] if isinstance(size, int) else list(size) for size in sizes), given["ceil_mode"])


def repeats_nearest(node: fx.Node) -> bool:
    """Tell whether a node resizes its input by taking the nearest element for each place."""
    return is_op(node, "interpolate") and argument(node, "mode") in ("nearest", "nearest-exact")


def pads_with_zeros(node: fx.Node) -> bool:
    """Tell whether a node puts zeros around its input, or cuts it where a size is below zero."""
    if not is_op(node, "pad"):
        return False
    given = arguments(node)
    is_constant = isinstance(module_of(node), _CONSTANT) if node.op == "call_module" else given["mode"] == "constant"
    return is_constant and given["value"] in (None, 0)
