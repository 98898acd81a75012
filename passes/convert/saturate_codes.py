"""Let a quantizer's own saturation do the work of a clamp before it.

    quantizer(relu6(x))                       ->  quantizer(x)                    floor 0, ceiling 6
    quantizer(max_pool2d(relu(x), 3))         ->  quantizer(max_pool2d(x, 3))     floor 0

    round(min(x, 6) / scale) = min(round(x / scale), round(6 / scale)), as rounding is monotone

Integer runtimes then have nothing between a product and its codes. Only where the clamp has no other reader.
"""

from typing import Any, Final

from torch import fx
from torch.nn import functional as F

from octav_fx.ir.arguments import argument, module_input
from octav_fx.ir.edits import Edit
from octav_fx.ir.ops import in_place, module_of, op_of
from octav_fx.nn import StaticQuantizer

# These select or move elements, so that a clamp before them is one behind them.
SELECTING: Final = frozenset({"max_pool", "flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze"})
_RANGES: Final = {"relu": (0.0, None), "relu6": (0.0, 6.0)}


def saturate_codes(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in list(gm.graph.find_nodes(op="call_module")):
        quantizer = module_of(node)
        if not isinstance(quantizer, StaticQuantizer) or quantizer.dim is not None:
            continue
        if len(gm.graph.find_nodes(op="call_module", target=node.target)) > 1:
            continue
        while (clamp := _clamp_before(node)) is not None and quantizer.narrow(*(ends := _range_of(clamp))):
            source = argument(clamp, "input")
            clamp.replace_all_uses_with(source)
            gm.graph.erase_node(clamp)
            edits.append(Edit(str(node.target), "saturate", "{} to {}".format(*ends)))
    return edits


def _clamp_before(quantizer: fx.Node) -> fx.Node | None:
    """Return the clamp whose result reaches the quantizer and nothing else, seen through ops that select."""
    node: Any = module_input(quantizer)
    while isinstance(node, fx.Node) and len(node.users) == 1 and (op := op_of(node)) is not None:
        if _range_of(node) != (None, None):
            # What is clamped in place must not be read as it was before.
            return None if in_place(node) and any(len(source.users) > 1 for source in node.all_input_nodes) else node
        if op.name not in SELECTING:
            return None
        node = argument(node, "input")
    return None


def _range_of(node: fx.Node) -> tuple[float | None, float | None]:
    """Return the ends of a clamp by numbers; (None, None) for any other node."""
    op = op_of(node)
    if op is None or op.name not in (*_RANGES, "clamp"):
        return None, None
    if op.name in _RANGES:
        return _RANGES[op.name]
    low, high = argument(node, "min"), argument(node, "max")
    if node.target is F.hardtanh:
        # A row has the defaults of its canonical spelling.
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    is_known = all(end is None or isinstance(end, (int, float)) for end in (low, high))
    return (low, high) if is_known else (None, None)
