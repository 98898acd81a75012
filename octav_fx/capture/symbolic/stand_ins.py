"""What evaluates a function on fake tensors in its place: torch's own way refuses what its kernels take, or is slow."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from octav_fx.compat.tensors import TORCH_GROUPED_MM
from octav_fx.ir.macs import MacCounter


def rows_times_experts(mat_a: Tensor, mat_b: Tensor, **_: Any) -> Tensor:
    """Return a result of the shape and work of rows [S, I] times experts' weights [E, I, O], or of a batch of those."""
    return torch.bmm(mat_a, mat_b) if mat_a.dim() == 3 else mat_a @ mat_b[0]


# Grouped products of fake tensors are refused unless they are bfloat16.
STAND_INS: Final[dict[Any, Callable[..., Any]]] = dict.fromkeys((F.grouped_mm, TORCH_GROUPED_MM), rows_times_experts)

_BATCH_NORM: Final = torch.ops.aten.native_batch_norm.default
_CHANNELS_LAST: Final = {4: torch.channels_last, 5: torch.channels_last_3d}


def put_stand_ins(graph: fx.Graph) -> None:
    """Let a graph that is evaluated on fake tensors call what stands in for its functions."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = STAND_INS.get(node.target, node.target)


class Evaluation(MacCounter):
    """Counts the multiply-accumulates of what fake tensors go through inside.

    A batch norm gives what it is given, anew: the dozen ops that torch makes of one take thirty times as long, and
    keep an order of axes in memory that its kernels do not.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op, or its stand-in, and add its work."""
        return _normalized(*args) if func is _BATCH_NORM else super().__torch_dispatch__(func, types, args, kwargs)


def _normalized(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *_: float) -> Any:
    """Return what a batch norm returns, without numbers: the result, and each channel's mean and deviation."""
    kept = _CHANNELS_LAST.get(x.dim())
    is_kept = kept is not None and x.is_contiguous(memory_format=kept)
    result = torch.empty_like(x, memory_format=kept if is_kept else torch.contiguous_format)
    # Statistics that are given are not computed.
    moment = (x if mean is None else mean).new_empty(x.shape[1] if training else 0)
    return result, moment, moment
