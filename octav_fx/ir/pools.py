"""Which nodes average whole images."""

from torch import fx
from torch.nn import functional as F

from octav_fx.ir.arguments import argument
from octav_fx.ir.ops import module_of, op_of

_ONE = (1, (1, 1), [1, 1])
_SPATIAL = ([2, 3], [-2, -1])


def is_global_mean(node: fx.Node) -> bool:
    """Tell whether a node is the mean over the two spatial axes of images [N, C, H, W]: a pool to one, or a mean."""
    op = op_of(node)
    if op is None:
        return False
    if op.name == "mean":
        axes = argument(node, "dim")
        return isinstance(axes, (tuple, list)) and list(axes) in _SPATIAL
    return op.name == "adaptive_avg_pool" and _is_planar(node) and argument(node, "output_size") in _ONE


def keeps_axes(node: fx.Node) -> bool:
    """Tell whether a global mean leaves the axes that it averages, with one element each."""
    op = op_of(node)
    return op is None or op.name != "mean" or bool(argument(node, "keepdim"))


def _is_planar(node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(module_of(node)).__name__.endswith("2d")
    return node.target is F.adaptive_avg_pool2d
