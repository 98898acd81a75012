"""Which nodes average whole images."""

from typing import Any

from torch import fx

from octav_fx.ir.ops import module_of, op_of


def is_global_mean(node: fx.Node) -> bool:
    """Whether a node is the mean over the two spatial axes of images [N, C, H, W]: a pool to one, or a mean."""
    op = op_of(node)
    if op is None or op.name not in ("adaptive_avg_pool", "mean") or not node.args:
        return False
    if op.name == "mean":
        axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return isinstance(axes, (tuple, list)) and list(axes) in ([2, 3], [-2, -1])
    size: Any
    if node.op == "call_module":
        size, name = module_of(node).output_size, type(module_of(node)).__name__
    else:
        size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
        name = str(getattr(node.target, "__name__", ""))
    return size in (1, (1, 1), [1, 1]) and name.endswith("2d")


def keeps_axes(node: fx.Node) -> bool:
    """Whether a global mean leaves the axes that it averages, with one element each."""
    op = op_of(node)
    if op is None or op.name != "mean":
        return True
    return bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
