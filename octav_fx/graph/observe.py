"""Running a model once without leaving a trace."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from octav_fx.graph.module import QUANTIZERS


def has_data(module: nn.Module, inputs: Any) -> bool:
    """Whether nothing is on the meta device, so that the module can run."""
    tensors = [*module.parameters(), *module.buffers(), *pytree.tree_leaves(inputs)]
    return not any(isinstance(t, Tensor) and t.is_meta for t in tensors)


def run_once(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """One forward in the module's own mode that fills the hints; statistics, random states and inputs are as before."""
    buffers = {b: b.clone() for name, b in module.named_buffers() if not name.startswith(QUANTIZERS + ".")}
    # Forward may write into its inputs.
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))
    devices = {t.device.index for t in (*module.parameters(), *buffers) if t.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)):
            module(*args, **kwargs)
    finally:
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)
