"""Solve the paper's clip by one step from the clip of the last call, in the kernel that computes the data.

    clip = optimal_clip(x, hint)    ->    beyond = sum(|x| where |x| >= hint)
                                          ...
                                          clip   = beyond / (noise * (seen - count) + count)

This is another clip (octav_fx/ops/optimal_clip/one_step.py), for whoever asks. The hint is the clip that the last call
found, so the recursion goes on from call to call, and each brings it nearer to the exact one: where that rose by a
tenth since the last call, 3 hundredths are left at 4 bits and 5 at 8, and the squared error is at most a tenth above
the least; where it rose or fell by a twentieth, six hundredths above. From a hint of zero about ten calls lead there; a
call of the model that is not compiled, which solves exactly, spares them. The exact solve reads the data again, after
it was written; these sums take no pass over memory where a pointwise kernel or a norm computes x.

Clips for channels, of other methods and of other formats are solved as before.
"""

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


def solve_by_one_step(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for solve in gm.graph.find_nodes(op="call_function", target=octav.optimal_clip.default):
        call = arguments_of(solve)
        plain = spec_of(call.spec).plain
        if call.method in METHODS and plain is not None and plain[1] is None:
            dim = _innermost(call.x) if is_pointwise(origin(call.x, VIEWS)) else None
            trace.write_out(solve, one_step, {**call, "dim": dim})
            edits.append(Edit(str(call.x), "one step", call.method))
    return edits


def _innermost(x: fx.Node) -> int | None:
    """Return the axis along which x lies in memory: a kernel that goes through x by rows has its sums at hand."""
    value = fake(x)
    axes = [axis for axis in range(value.dim()) if value.stride(axis) == 1 and value.shape[axis] != 1]
    return axes[-1] if axes else None
