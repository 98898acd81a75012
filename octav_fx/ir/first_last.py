"""The edge of a network: first convolutions and last fully connected layers, which keep more bits."""

import networkx as nx
from torch import fx

from octav_fx.ir.dataflow import downstream, upstream
from octav_fx.ir.op import Trait
from octav_fx.ir.ops import op_of
from octav_fx.ir.table.contractions import CONTRACTIONS


def first_and_last_layers(flow: "nx.DiGraph[fx.Node]") -> set[fx.Node]:
    """Return the convolutions that no contraction feeds and the fully connected layers that feed none.

    arXiv 2206.06501, appendix E. Which op may be which is a trait of its row.
    """
    found = {node: op for node in flow if (op := op_of(node)) in CONTRACTIONS}
    firsts = {node for node, op in found.items() if Trait.FIRST_LAYER in op.traits}
    lasts = {node for node, op in found.items() if Trait.LAST_LAYER in op.traits}
    return (firsts - downstream(flow, found)) | (lasts - upstream(flow, found))
