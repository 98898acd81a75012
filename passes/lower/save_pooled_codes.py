"""Keep the codes of levels that were pooled, and not the pool's float copy of them, where backward reads it.

    pooled = max_pool(dequantize(codes, clip))[0]
        ->  codes_1 = quantize(pooled, clip)
            levels  = dequantize(codes_1, clip)     recomputed in backward, in place of pooled

The largest of some levels is one of them, and quantizing a level gives its code: no value changes. One byte for each
element is kept in place of four.
"""

import torch
from torch import fx

from octav_fx.compat.graphs import is_max_pool
from octav_fx.ir.calls import arguments_of, insert_call
from octav_fx.ir.edits import Edit
from octav_fx.ir.joint import VIEWS, backward_of, closure, results_of
from octav_fx.passes.lower.save_codes import tag_levels

octav = torch.ops.octav


def save_pooled_codes(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    backward = backward_of(gm.graph)
    edits = []
    # Those that are put in on the way among them: a pool may follow a pool.
    for levels in gm.graph.nodes:
        if levels.target is not octav.dequantize.default:
            continue
        pools = [user for view in closure(levels, VIEWS) for user in view.users if is_max_pool(user)]
        for pooled in (found[0] for pool in pools if 0 in (found := results_of(pool))):
            is_done = any(user.target is octav.quantize.default for user in pooled.users)
            if not is_done and any(backward.intersection(view.users) for view in closure(pooled, VIEWS)):
                _save(levels, pooled)
                edits.append(Edit(pooled.name, "save codes", levels.name))
    return edits


def _save(levels: fx.Node, pooled: fx.Node) -> None:
    """Let whoever reads pooled levels read those of their codes."""
    graph, call = pooled.graph, arguments_of(levels)
    with graph.inserting_after(pooled):
        codes = insert_call(graph, octav.quantize.default, call, x=pooled)
    with graph.inserting_after(codes):
        new = insert_call(graph, octav.dequantize.default, call, codes=codes)
    pooled.replace_all_uses_with(new, delete_user_cb=lambda user: user is not codes)
    tag_levels(new)
