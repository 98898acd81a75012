"""Small models and their captured graphs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from octav_fx.capture.guards import GuardedGraph
from octav_fx.capture.modules import QuantizedModule
from octav_fx.capture.symbolic.trace import capture


def model(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    """A module in eval mode with this forward(self, ...) and these submodules, parameters, buffers and attributes."""
    module = type("Model", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
            module.register_buffer(name, part)
        else:
            setattr(module, name, part)
    return module.eval()


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def captured(float_module: nn.Module, **arguments: Any) -> QuantizedModule:
    """The graph of a module over its tree, before any pass."""
    found = capture(float_module, arguments)
    guarded = GuardedGraph(found.graph, found.guards)
    return QuantizedModule(float_module, {True: [guarded], False: [guarded]}, {})


def run_alike(first: Callable[..., Any], second: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether both return the same structure and the same bits, each from its own inputs and the same random state."""
    results = []
    for function in (first, second):
        own_args, own_kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        with torch.random.fork_rng():
            results.append(pytree.tree_flatten(function(*own_args, **own_kwargs)))
    (one, one_spec), (two, two_spec) = results
    return one_spec == two_spec and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, two, strict=True)
    )
