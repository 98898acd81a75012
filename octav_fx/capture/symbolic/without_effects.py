"""What asks for sizes, without what a graph does besides: it moves no statistics, writes nothing, draws nothing."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from octav_fx.capture.symbolic.sizes import RESHAPES_IN_PLACE, keeps_shape
from octav_fx.ir.meta import fake
from octav_fx.ir.ops import in_place, module_of

# Functions that move statistics which they are given.
_NORMS: Final = frozenset({F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm})
_DROPS: Final = frozenset(
    {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}
)


def drop_effects(graph: fx.Graph) -> None:
    """Let what is computed from layers, writes and random numbers be computed from what has the same sizes."""
    _without_layers(graph)
    _without_writes(graph)
    _without_draws(graph)


def moves_buffers(node: fx.Node) -> bool:
    """Tell whether a node moves running statistics."""
    if node.op != "call_module":
        return node.target in _NORMS
    module = module_of(node)
    return module.training and any(True for _ in module.buffers())


def _without_layers(graph: fx.Graph) -> None:
    """Let what reads a layer that keeps sizes, such as a batch norm, read its input, which has them.

    Asking for a size must not move statistics, and takes less time so.
    """
    for node in graph.nodes:
        given = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(given, fx.Node) or not keeps_shape(node):
            continue
        own, before = fake(node), fake(given)
        is_alike = isinstance(own, Tensor) and isinstance(before, Tensor) and own.dtype is before.dtype
        if (node.op == "call_module" and is_alike) or moves_buffers(node):
            node.replace_all_uses_with(given)


def _without_writes(graph: fx.Graph) -> None:
    """Let what reads the result of a write read what was written into, where that keeps its shape: it has its sizes."""
    for node in graph.nodes:
        target = node.args[0] if node.args else None
        is_write = (
            node.op in ("call_function", "call_method") and in_place(node) and node.target not in RESHAPES_IN_PLACE
        )
        if is_write and isinstance(target, fx.Node):
            before, after = fake(target), fake(node)
            if isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape == after.shape:
                node.replace_all_uses_with(target)


def _without_draws(graph: fx.Graph) -> None:
    """Let sizes be asked of zeros in place of random numbers: torch.randn(2, n, generator=g) -> torch.zeros(2, n).

    A compiler may run what asks for sizes, and the graph would draw other random numbers then. Zero is an index, too.
    """
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "bernoulli":
            node.op, node.target, node.args, node.kwargs = "call_function", torch.zeros_like, node.args[:1], {}
        elif node.op == "call_function" and node.target in _DRAWS:
            node.target = _DRAWS[node.target]
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "generator"}
        elif node.op == "call_function" and node.target in _DROPS:
            node.replace_all_uses_with(node.all_input_nodes[0])


def _as_integers(*args: Any, low: int = 0, high: int = 0, size: Any = None, **kwargs: Any) -> Tensor:
    """Return what torch.randint returns, of zeros."""
    return torch.zeros(args[-1] if size is None else size, **{"dtype": torch.int64, **kwargs})


def _alike(x: Tensor, *_: Any, **kwargs: Any) -> Tensor:
    """Return what randint_like and bernoulli return, of zeros."""
    return torch.zeros_like(x, **{name: value for name, value in kwargs.items() if name in ("dtype", "device")})


_DRAWS: Final[dict[Any, Callable[..., Tensor]]] = {
    **dict.fromkeys((torch.rand, torch.randn), torch.zeros),
    **dict.fromkeys((torch.rand_like, torch.randn_like), torch.zeros_like),
    **dict.fromkeys((torch.randint_like, torch.bernoulli), _alike),
    torch.randint: _as_integers,
    torch.randperm: torch.arange,
}
