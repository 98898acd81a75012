"""Take a fused attention apart, so that the output of its softmax can be quantized, too.

    attention(q, k, v, mask, dropout_p, is_causal)
        ->  scores  = matmul(q, k.transpose(-2, -1)) * scale
            weights = dropout(masked_softmax(scores, mask, is_causal), dropout_p)
            matmul(weights, v)

The result is the same but for rounding: fused kernels add up in another order. What is lost is their speed and memory,
the scores of all pairs. With grouped queries (enable_gqa) each head of k and v is repeated for its group.
"""

import math
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from octav_fx.ir.edits import Edit, insert_captured, site_of, skip
from octav_fx.ir.masked_softmax import masked_softmax
from octav_fx.ir.ops import op_of


def decompose_attention(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in list(gm.graph.nodes):
        op = op_of(node)
        if op is None or op.name != "attention" or node.op != "call_function":
            continue
        operands = [source.meta.get("value") for source in node.args[:3] if isinstance(source, fx.Node)]
        if not all(isinstance(value, Tensor) for value in operands):
            edits.append(skip(node, "an operand's shape is not known at capture, the attention stays fused"))
            continue
        edits.append(_split(gm.graph, node))
    return edits


def _split(graph: fx.Graph, node: fx.Node) -> Edit:
    settings: dict[str, Any] = {**dict(zip(_SETTINGS, node.args[3:], strict=False)), **node.kwargs}
    query, key, value = node.args[:3]
    site, sizes = site_of(node), [operand.meta["value"].shape for operand in node.args[:3]]  # type: ignore[union-attr]
    with graph.inserting_before(node):
        if settings.get("enable_gqa"):
            group = sizes[0][-3] // sizes[1][-3]
            key, value = (insert_captured(graph, torch.repeat_interleave, heads, group, -3) for heads in (key, value))
        scores = insert_captured(graph, torch.matmul, query, insert_captured(graph, "transpose", key, -2, -1))
        scale = settings.get("scale")
        scaled = insert_captured(graph, torch.mul, scores, 1 / math.sqrt(sizes[0][-1]) if scale is None else scale)
        masks = settings.get("attn_mask"), settings.get("is_causal", False)
        weights = insert_captured(graph, masked_softmax, scaled, *masks)
        dropout = settings.get("dropout_p", 0.0)
        if isinstance(dropout, fx.Node) or dropout > 0:
            weights = insert_captured(graph, F.dropout, weights, dropout, True)
        output = insert_captured(graph, torch.matmul, weights, value)
    scores.meta["site"], output.meta["site"] = f"{site}.scores", f"{site}.output"
    node.replace_all_uses_with(output)
    graph.erase_node(node)
    return Edit(site, "split", "scores and output")


_SETTINGS: Final = ("attn_mask", "dropout_p", "is_causal")
