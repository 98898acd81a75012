"""A call in an aten graph, written out as what a function of torch computes."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from octav_fx.compat.graphs import inductor_decompositions
from octav_fx.compat.tensors import detect_fake_mode
from octav_fx.ir.joint import replace
from octav_fx.ir.meta import fake


def write_out(
    node: fx.Node,
    function: Callable[..., Tensor],
    call: Mapping[str, Any],
    edit: Callable[[fx.Graph], None] = lambda graph: None,
) -> None:
    """Replace a node by the aten ops of function(**call), which are traced, and edited before they are inserted."""
    inputs = [name for name, value in call.items() if isinstance(value, fx.Node)]
    values = [fake(call[name]) for name in inputs]

    def of_tensors(*tensors: Tensor) -> Tensor:
        return function(**{**call, **dict(zip(inputs, tensors, strict=True))})

    with detect_fake_mode(values) or contextlib.nullcontext(), torch.no_grad():
        traced = make_fx(of_tensors, decomposition_table=inductor_decompositions())(*values)
    edit(traced.graph)
    with node.graph.inserting_before(node):
        placeholders = traced.graph.find_nodes(op="placeholder")
        result = node.graph.graph_copy(
            traced.graph, dict(zip(placeholders, [call[name] for name in inputs], strict=True))
        )
    assert isinstance(result, fx.Node)
    replace(node, result)
