"""Tensors that forward takes from its modules past their attributes: what it computes of them is the graph's.

for p in self.parameters(): penalty = penalty + p.norm()    nodes, where Python would compute numbers once
self.steps += 1                                             a plain tensor, written at each call
"""

import copy
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from octav_fx.capture.contents import attributes
from octav_fx.capture.symbolic.proxies import PROXIES
from octav_fx.compat.modules import PART_ATTRIBUTES
from octav_fx.compat.tensors import NEEDS_DATA, pytree

if TYPE_CHECKING:
    from octav_fx.capture.symbolic.tracer import ValueTracer

# What is no fact of a tensor's kind: written, or asked of autograd.
_ATTRIBUTES: Final = frozenset({"data", "grad", "requires_grad", "T", "mT", "H", "mH", "real", "imag"})

# Where forward finds a tensor: an attribute of a module, and keys in the lists and dicts there.
Place = tuple[str, tuple[Any, ...]]


def places_of_tensors(root: nn.Module) -> dict[int, Place]:
    """Return where each tensor of the modules is, by identity: the first name of a parameter or buffer, above all."""
    found: dict[int, Place] = {}
    for path, module in root.named_modules():
        for name, value in vars(module).items():
            if name not in PART_ATTRIBUTES:
                found |= {id(t): (f"{path}.{name}".lstrip("."), keys) for t, keys in _held(value)}
    # A class may tell names of its own, as wrappers do that are to be unseen in checkpoints.
    parameters = nn.Module.named_parameters(root, remove_duplicate=False)
    named = [*parameters, *nn.Module.named_buffers(root, remove_duplicate=False)]
    return found | {id(tensor): (name, ()) for name, tensor in reversed(named)}


def holders_of_tensors(root: nn.Module) -> dict[str, Any]:
    """Return the tensors that are attributes of modules, and lists, tuples and dicts there that hold some, by name."""
    found: dict[str, Any] = {}
    for path, held in attributes(root):
        for name, value in held.items():
            if name not in PART_ATTRIBUTES and _held(value):
                found[f"{path}.{name}".lstrip(".")] = value if isinstance(value, Tensor) else copy.copy(value)
    return found


def _held(value: Any, keys: tuple[Any, ...] = ()) -> list[tuple[Tensor, tuple[Any, ...]]]:
    if isinstance(value, Tensor):
        return [(value, keys)]
    items = value.items() if type(value) is dict else enumerate(value) if type(value) in (list, tuple) else ()
    return [found for key, item in items if isinstance(key, (int, str)) for found in _held(item, (*keys, key))]


class StateTensors(TorchFunctionMode):
    """Makes nodes of what is computed of tensors of modules alone, where no proxy sees it."""

    def __init__(self, tracer: "ValueTracer") -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, on proxies where it computes a tensor of those of modules."""
        kwargs = kwargs or {}
        if self.tracer.evaluating or func is Tensor.__hash__:
            return func(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        if any(type(leaf) in PROXIES for leaf in leaves) or not any(map(self.tracer.is_state, leaves)):
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in ("__get__", "__set__"):
            attribute = func.__self__.__name__
            if attribute not in _ATTRIBUTES:
                return func(*args, **kwargs)
            proxy = self.tracer.proxy_of(args[0])
            return getattr(proxy, attribute) if len(args) < 2 or args[1] is None else setattr(proxy, attribute, args[1])
        if self._is_about_kind(func, args, kwargs):
            return func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(self.tracer.is_state, self.tracer.proxy_of, (args, kwargs))
        name = getattr(func, "__name__", "")
        is_method = getattr(Tensor, name, None) is func and type(args[0]) in PROXIES
        return getattr(args[0], name)(*args[1:], **kwargs) if is_method else func(*args, **kwargs)

    def _is_about_kind(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Tell whether a function says something that no data of the tensors changes: a size, a device."""
        fakes = pytree.tree_map_only(Tensor, self.tracer.fake_mode.from_tensor, (args, kwargs))
        self.tracer.evaluating = True
        try:
            with self.tracer.fake_mode, torch.no_grad():
                result = func(*fakes[0], **fakes[1])
        except NEEDS_DATA:
            return False
        finally:
            self.tracer.evaluating = False
        return not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))
