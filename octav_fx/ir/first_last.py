"""The edge of a network: first convolutions and last linear layers, which keep more bits."""

import networkx as nx
from torch import fx

from octav_fx.ir.dataflow import downstream, upstream
from octav_fx.ir.ops import CONTRACTIONS, op_of

_CONTRACTIONS = frozenset(op.name for op in CONTRACTIONS)


def first_and_last_layers(flow: "nx.DiGraph[fx.Node]") -> set[fx.Node]:
    """Convolutions that no contraction feeds and linear layers that feed none (arXiv 2206.06501, appendix E)."""
    names = {node: op.name for node in flow if (op := op_of(node)) is not None and op.name in _CONTRACTIONS}
    convs = {node for node, name in names.items() if name.startswith("conv")}
    linears = {node for node, name in names.items() if name == "linear"}
    return (convs - downstream(flow, names)) | (linears - upstream(flow, names))
