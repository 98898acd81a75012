"""What evaluates a function on fake tensors in its place: torch's own way refuses what its kernels take, or is slow."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from octav_fx.compat.tensors import TORCH_GROUPED_MM
from octav_fx.ir.macs import MacCounter

aten = torch.ops.aten


def rows_times_experts(mat_a: Tensor, mat_b: Tensor, **_: Any) -> Tensor:
    """Return a result of the shape and work of rows [S, I] times experts' weights [E, I, O], or of a batch of those."""
    return torch.bmm(mat_a, mat_b) if mat_a.dim() == 3 else mat_a @ mat_b[0]


# Grouped products of fake tensors are refused unless they are bfloat16.
STAND_INS: Final[dict[Any, Callable[..., Any]]] = dict.fromkeys((F.grouped_mm, TORCH_GROUPED_MM), rows_times_experts)


def put_stand_ins(graph: fx.Graph) -> None:
    """Let a graph that is evaluated on fake tensors call what stands in for its functions."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = STAND_INS.get(node.target, node.target)


class Evaluation(MacCounter):
    """Counts the multiply-accumulates of what fake tensors go through inside.

    A batch norm gives what it is given, anew: the dozen ops that torch makes of one take thirty times as long.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op, or its stand-in, and add its work."""
        if func is aten.native_batch_norm.default:
            # The means and deviations that come with it are for a backward.
            return torch.empty_like(args[0]), *args[3:5]
        return super().__torch_dispatch__(func, types, args, kwargs)
