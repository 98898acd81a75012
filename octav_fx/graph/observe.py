"""Running a model once without leaving a trace."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from octav_fx.graph.call import Call, is_alike
from octav_fx.graph.macs import MacCounter
from octav_fx.graph.module import QuantizedModule
from octav_fx.ops import FakeQuantizer


def has_data(module: nn.Module, inputs: Any) -> bool:
    """Whether nothing is on the meta device, so that the module can run."""
    tensors = [*module.parameters(), *module.buffers(), *pytree.tree_leaves(inputs)]
    return not any(isinstance(t, Tensor) and t.is_meta for t in tensors)


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


def work(root: nn.Module, call: Call) -> list[tuple[str, int]]:
    """Which modules multiply, the innermost each, in the order in which they do: (path, multiply-accumulates)."""
    found: list[tuple[str, int]] = []
    inside = [""]
    counted = 0

    def settle() -> None:
        nonlocal counted
        if counter.macs > counted:
            found.append((inside[-1], counter.macs - counted))
            counted = counter.macs

    def enter(path: str) -> None:
        settle()
        inside.append(path)

    def leave() -> None:
        settle()
        inside.pop()

    with MacCounter() as counter, _hooked(dict(root.named_modules()), lambda path, _: enter(path), leave):
        run_once(root, *call)
        settle()
    return found


def calls_of(module: nn.Module, call: Call, children: Mapping[str, nn.Module]) -> dict[str, list[Call]]:
    """How a module calls its children: the first Call of each kind (is_alike) that its example leads to."""
    found: dict[str, list[Call]] = {name: [] for name in children}

    def record(name: str, made: Call) -> None:
        if not any(is_alike(made, known) for known in found[name]):
            # What is called may write into its inputs.
            args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (made.args, dict(made.kwargs)))
            found[name].append(Call(args, kwargs))

    with _hooked(children, record, lambda: None):
        run_once(module, *call)
    return found


@contextmanager
def _hooked(
    modules: Mapping[str, nn.Module], enter: Callable[[str, Call], None], leave: Callable[[], None]
) -> Iterator[None]:
    """Inside, enter(path, call) runs before each call of the modules, and leave() after it."""
    handles = []
    for path, module in modules.items():
        if path and not isinstance(module, torch.jit.ScriptModule):

            def before(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                enter(path, Call(args, kwargs))

            def after(_: nn.Module, args: Any, result: Any) -> None:
                leave()

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
