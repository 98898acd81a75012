"""Keep the levels of activations for backward, beside their codes, for whoever has the memory.

    levels = dequantize(codes, clip)    recomputed in backward  ->  kept

after save_codes, which marked them. Backward then reads what forward wrote anyway, and does not write it a second time:
3 bytes less for each element in half precision, 5 in float32. They are held between the two halves, where codes alone
take one byte each. Levels of weights are still computed again: what they come from is there.
"""

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from octav_fx.ir.edits import Edit

octav = torch.ops.octav


def keep_levels(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for levels in gm.graph.find_nodes(op="call_function", target=octav.dequantize.default):
        # Views of them are still made again. What a region of the user's computes again has another id.
        tags = levels.meta.get("recompute"), levels.meta.get("ac_graph_id")
        if tags == (CheckpointPolicy.MUST_RECOMPUTE, 0):
            levels.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            edits.append(Edit(levels.name, "keep levels", "for backward"))
    return edits
