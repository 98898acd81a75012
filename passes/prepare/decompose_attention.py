"""Take a fused attention apart, so that the output of its softmax can be quantized, too.

    attention(q, k, v, mask, dropout_p, is_causal)
        ->  scores  = matmul(q, k.transpose(-2, -1)) * scale
            weights = dropout(masked_softmax(scores, mask, is_causal), dropout_p)
            matmul(weights, v)

The result is the same but for rounding: fused kernels add up in another order. What is lost is their speed and memory,
the scores of all pairs. The scale is a number, and asked of q where the caller decides how wide its heads are. With
grouped queries (enable_gqa) each head of k and v is repeated for its group.
"""

import math
import operator

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from octav_fx.ir.arguments import arguments, operand_of, operands_of
from octav_fx.ir.edits import Edit, insert_captured, site_of
from octav_fx.ir.masked_softmax import masked_softmax
from octav_fx.ir.meta import fake, update
from octav_fx.ir.ops import op_of
from octav_fx.ir.table.contractions import ATTENTION


def decompose_attention(gm: fx.GraphModule) -> list[Edit]:
    """See the module's docstring."""
    edits = []
    for node in list(gm.graph.nodes):
        if op_of(node) is not ATTENTION or node.op != "call_function":
            continue
        sources = [source for operand in operands_of(node) if isinstance(source := operand_of(node, operand), fx.Node)]
        if not all(isinstance(fake(source), Tensor) for source in sources):
            reason = "an operand's shape is not known at capture, the attention stays fused"
            edits.append(Edit.unsupported(node, reason))
            continue
        edits.append(_split(gm.graph, node))
    return edits


def _split(graph: fx.Graph, node: fx.Node) -> Edit:
    site, given = site_of(node), arguments(node)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    scale = given["scale"]
    if scale is None and not _is_an_input(query):
        scale = 1 / math.sqrt(fake(query).shape[-1])
    with graph.inserting_before(node):
        if given["enable_gqa"]:
            group = fake(query).shape[-3] // fake(key).shape[-3]
            key, value = (insert_captured(graph, torch.repeat_interleave, part, group, -3) for part in (key, value))
        scores = insert_captured(graph, torch.matmul, query, insert_captured(graph, "transpose", key, -2, -1))
        if scale is None:
            scale = insert_captured(graph, operator.pow, insert_captured(graph, "size", query, -1), -0.5)
        scaled = insert_captured(graph, torch.mul, scores, scale)
        weights = insert_captured(graph, masked_softmax, scaled, given["attn_mask"], given["is_causal"])
        dropout = given["dropout_p"]
        if isinstance(dropout, fx.Node) or dropout > 0:
            weights = insert_captured(graph, F.dropout, weights, dropout, True)
        output = insert_captured(graph, torch.matmul, weights, value)
    update(scores, site=f"{site}.scores")
    update(output, site=f"{site}.output")
    node.replace_all_uses_with(output)
    graph.erase_node(node)
    return Edit(site, "split", "scores and output")


def _is_an_input(node: fx.Node) -> bool:
    """Return whether a node is an argument of forward, or a view of one: no weight says how long its last axis is."""
    while node.op == "call_method":
        # Its own tensor is the first that a method reads.
        node = node.all_input_nodes[0]
    return node.op == "placeholder"
