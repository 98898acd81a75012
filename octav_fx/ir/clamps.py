"""Which nodes clamp a value to constants."""

from torch import fx
from torch.nn import functional as F

from octav_fx.ir.arguments import argument
from octav_fx.ir.ops import op_of

_BOUNDS = {"relu": (0.0, None), "relu6": (0.0, 6.0)}


def clamp_bounds(node: fx.Node) -> tuple[float | None, float | None] | None:
    """Return the bounds of a node that clamps its one input to numbers, None for no bound; None for any other node."""
    op = op_of(node)
    if op is None or len(node.all_input_nodes) != 1:
        return None
    if op.name in _BOUNDS:
        return _BOUNDS[op.name]
    if op.name != "clamp":
        return None
    low, high = argument(node, "min"), argument(node, "max")
    if node.target is F.hardtanh:
        # A row has the defaults of its canonical spelling.
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    if not all(bound is None or isinstance(bound, (int, float)) for bound in (low, high)):
        return None
    return (None if low is None else float(low)), (None if high is None else float(high))
