"""Running a model once without leaving a trace."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from octav_fx.graph.module import QuantizedModule
from octav_fx.ops import FakeQuantizer


def has_data(module: nn.Module, inputs: Any) -> bool:
    """Whether nothing is on the meta device, so that the module can run."""
    tensors = [*module.parameters(), *module.buffers(), *pytree.tree_leaves(inputs)]
    return not any(isinstance(t, Tensor) and t.is_meta for t in tensors)


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a tuple of arguments or a dict of keyword arguments as (args, kwargs)."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def run_once(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The outputs of one forward in the module's own mode; statistics, random states and inputs are as before.

    Only the hints of quantizers change.
    """
    hints = {m.hint for m in module.modules() if isinstance(m, FakeQuantizer)}
    buffers = {b: b.clone() for b in module.buffers() if b not in hints}
    # Forward may write into its inputs.
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs)))
    devices = {t.device.index for t in (*module.parameters(), *buffers) if t.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)):
            return module(*args, **kwargs)
    finally:
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode; afterwards each is in the mode it was in, frozen BatchNorms too."""
    modes = {m: m.training for m in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for m, training in modes.items():
            if isinstance(m, QuantizedModule):
                m.train(training)
        for m, training in modes.items():
            m.training = training


@contextmanager
def without_quantizers(module: nn.Module) -> Iterator[None]:
    """Inside, every quantizer returns its input: the rewritten graph computes in float."""
    quantizers = [m for m in module.modules() if isinstance(m, FakeQuantizer)]
    for quantizer in quantizers:
        quantizer.__dict__["forward"] = lambda x: x
    try:
        yield
    finally:
        for quantizer in quantizers:
            del quantizer.__dict__["forward"]


def difference(expected: Any, found: Any) -> str | None:
    """How two results of a model differ by more than rounding, or None. NaN equals NaN."""
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    found_leaves, found_spec = pytree.tree_flatten(found)
    if expected_spec != found_spec:
        return f"its result is {found_spec} instead of {expected_spec}"
    for e, f in zip(expected_leaves, found_leaves, strict=True):
        if not isinstance(e, Tensor) or not isinstance(f, Tensor):
            if type(e) is not type(f):
                return f"it returns {f!r} instead of {e!r}"
        elif e.shape != f.shape or e.dtype != f.dtype:
            return f"it returns {f.dtype} {tuple(f.shape)} instead of {e.dtype} {tuple(e.shape)}"
        elif not torch.equal(e, f) and e.is_floating_point():
            # Fused inference paths of torch (attention) round otherwise; another branch taken differs by far more.
            e, f = e.double().nan_to_num(), f.double().nan_to_num()
            if (e - f).norm() > 1e-2 * e.norm():
                return f"its result of shape {tuple(e.shape)} is off by {float((e - f).norm() / e.norm()):.1%}"
    return None
