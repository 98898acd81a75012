"""Solve the paper's clip by one step from the clip of the last call, in the kernel that computes the data.

    clip = optimal_clip(x, hint)    ->    beyond = sum(|x| where |x| >= hint)
                                          ...
                                          clip   = beyond / (noise * (seen - count) + count)

This is another clip (octav_fx/ops/optimal_clip/one_step.py), for whoever asks. The hint is the clip that the last call
found, so the recursion goes on from call to call, and each brings it nearer to the exact one: where that rose by a
tenth since the last call, 3 hundredths are left at 4 bits and 5 at 8, and the squared error is at most a tenth above
the least; where it rose or fell by a twentieth, six hundredths above. From a hint of zero about ten calls lead there; a
call of the model that is not compiled, which solves exactly, spares them. The exact solve reads the data again, after
it was written; these sums take no pass over memory where Inductor fuses them with the kernel that computes x. It does
where the sums of rows come first, and the rows are those that the kernel goes through.

Clips for channels, of other methods and of other formats are solved as before.
"""

import math
import operator
from typing import Final

import torch
from torch import fx

from octav_fx.formats.spec import spec_of
from octav_fx.ir import trace
from octav_fx.ir.calls import arguments_of
from octav_fx.ir.edits import Edit
from octav_fx.ir.joint import VIEWS, is_pointwise, origin
from octav_fx.ir.meta import fake
from octav_fx.ops.optimal_clip.one_step import METHODS, one_step

octav, aten = torch.ops.octav, torch.ops.aten

# Elements of a row.
ROW: Final = 512
# What norms and softmax go along an axis with.
_REDUCTIONS: Final = frozenset({aten.var_mean.correction, aten.mean.dim, aten.sum.dim_IntList, aten.amax.default})


def solve_by_one_step(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for solve in gm.graph.find_nodes(op="call_function", target=octav.optimal_clip.default):
        call = arguments_of(solve)
        plain = spec_of(call.spec).plain
        if call.method in METHODS and plain is not None and plain[1] is None:
            dims = _row(call.x) if is_pointwise(origin(call.x, VIEWS)) else None
            trace.write_out(solve, one_step, {**call, "dims": dims})
            edits.append(Edit(str(call.x), "one step", call.method))
    return edits


def _row(x: fx.Node) -> list[int]:
    """Return the innermost axes of x in memory that make a row: a kernel that goes through rows has their sums at hand.

    Of a row three sums and a maximum are written and read, 32 bytes, which a long row makes little of. A kernel that
    normalizes x has rows of its own. Axes of a free size are left out.
    """
    value, rows = fake(x), _rows_reduced(x)
    sizes = zip(value.stride(), value.shape, range(value.dim()), strict=True)
    known = [(stride, size, axis) for stride, size, axis in sizes if isinstance(stride, int) and isinstance(size, int)]
    axes, length = [], 1
    for _, size, axis in sorted(known):
        if length >= ROW or length in rows:
            break
        if size != 1:
            axes.append(axis)
            length *= size
    return sorted(axes)


def _rows_reduced(x: fx.Node) -> set[int]:
    """Return how many elements each sum, mean or maximum is of from which x is computed by pointwise ops."""
    found, seen, left = set(), {x}, [x]
    while left:
        node = left.pop()
        if is_pointwise(node) or node.target is operator.getitem:
            left += (new := [read for read in node.all_input_nodes if read not in seen])
            seen.update(new)
        elif node.target in _REDUCTIONS:
            call = arguments_of(node)
            shape = fake(call["self"]).shape
            sizes = [shape[axis] for axis in call.dim or range(len(shape))]
            if all(isinstance(size, int) for size in sizes):
                found.add(math.prod(sizes))
    return found
