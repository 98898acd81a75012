"""IntegerModule: what convert() makes of the graph of a module."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from octav_fx.capture.classes import converted_class, users_class
from octav_fx.capture.dispatch import GuardedModule, is_traced
from octav_fx.capture.flat import flatten, unflatten
from octav_fx.capture.guards import GuardedGraph, Guards
from octav_fx.compat.graphs import call_of_class
from octav_fx.compat.modules import children_of, parameters_of, replace_children, share_forward_hooks, share_parts
from octav_fx.compat.tensors import pytree
from octav_fx.errors import OctavError
from octav_fx.nn.fake_quantizer import QUANTIZERS
from octav_fx.nn.static import dtype_after


class IntegerModule(GuardedModule):
    """A GraphModule that holds what its graph reads and no more, and that copies and pickles without being traced."""

    # What .half() and its like have made of the parts that stay float since.
    _cast_to: torch.dtype | None = None

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        name: str,
        meta: Mapping[str, Any],
        attributes: Mapping[str, Any],
        guards: Guards | None = None,
    ) -> None:
        super().__init__(root, graph, name)
        self.meta = dict(meta)
        self.training = False
        self._guards = guards
        self._guarded = GuardedGraph(self.graph, guards)
        self.recompile()
        # Plain ones of the float module (num_experts), which code around it may read.
        self.__dict__["octav_attributes"] = dict(attributes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph. A gradient through it would be zero: asking for one raises OctavError."""
        result = super().__call__(*args, **kwargs)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not given or not torch.is_grad_enabled():
            return result
        return pytree.tree_map(lambda y: WithoutGradient.apply(y, *given) if _is_floating(y) else y, result)

    def remember_outline(self, owner: nn.Module) -> None:
        """Let code around read of a layer whose weight is codes now what does not depend on its values."""
        outline = _outline(owner)
        parts = {**parameters_of(outline), **children_of(outline)}
        self.__dict__["octav_attributes"] |= {name: part for name, part in parts.items() if not hasattr(self, name)}

    def stand_for(self, kind: type[nn.Module]) -> None:
        """Let code around, which may ask what it calls, find a module of a user's class.

        Raises OctavError for a class that Python does not let this be of.
        """
        # Each has a class of its own.
        own = type(self)
        try:
            self.__class__ = converted_class(own, kind, call_of_class(own))
        except TypeError as error:
            raise OctavError(
                f"a converted layer cannot be of class {kind.__name__}, which the code around it may ask for: {error}; "
                "take __slots__ out of that class"
            ) from error

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in (known := self.__dict__.get("octav_attributes", {})):
                raise
            return known[name]

    def _captured(self) -> Sequence[GuardedGraph]:
        return [self._guarded] if "_guarded" in self.__dict__ else []

    def _dispatch(self, *args: Any, **kwargs: Any) -> Any:
        if is_traced(args):
            return self._guarded.function()(self, *args, **kwargs)
        self._check(args, kwargs)
        if torch.compiler.is_compiling():
            return self._guarded.function()(self, *args, **kwargs)
        try:
            return self._guarded.function()(self, *args, **kwargs)
        except RuntimeError as error:
            if self._cast_to is None:
                raise
            raise OctavError(
                f"{str(error).splitlines()[0]}: this converted model was cast to {self._cast_to}, and its integers "
                "return float32: cast before octav_fx.quantize, or call it under torch.autocast instead"
            ) from error

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "IntegerModule":
        dtype = dtype_after(fn, torch.float32)
        self.__dict__["_cast_to"] = None if dtype is torch.float32 else dtype
        super()._apply(fn, recurse)
        return self

    def check_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise OctavError for a call that the graph does not hold for: torch.export runs the graph past forward."""
        try:
            bound = inspect.signature(self.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise OctavError(f"the inputs do not fit {type(self).__name__}.forward: {error}") from error
        bound.apply_defaults()
        self._check(bound.args, bound.kwargs)

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (fault := self._guarded.broken(self, args, kwargs)) is not None:
            raise OctavError(
                f"{fault}: a converted model holds for calls of one kind, the example of octav_fx.quantize or what "
                "octav_fx.calibrate ran instead: calibrate with batches like this call alone, freeze, and convert again"
            )

    def _parts(self) -> tuple[Any, ...]:
        root = nn.Module()
        share_parts(self, root)
        share_forward_hooks(self, root)
        attributes, users = self.__dict__["octav_attributes"], users_class(type(self))
        kind = None if users is type(self) else users
        return root, flatten(self.graph), type(self).__name__, self.meta, attributes, self._guards, kind

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _rebuild_integer, self._parts()

    def __deepcopy__(self, memo: dict[int, Any]) -> "IntegerModule":
        copied = _rebuild_integer(*copy.deepcopy(self._parts(), memo))
        memo[id(self)] = copied
        return copied


def _outline(module: nn.Module) -> nn.Module:
    """Return a module of the names, shapes and types of the parameters of another one, on the meta device."""
    outline = nn.Module()
    for name, parameter in parameters_of(module).items():
        made = None if parameter is None else nn.Parameter(torch.empty_like(parameter, device="meta"), False)
        outline.register_parameter(name, made)
    for name, child in children_of(module).items():
        if child is not None and name != QUANTIZERS and not isinstance(child, torch.jit.ScriptModule):
            outline.add_module(name, _outline(child))
    return outline


class WithoutGradient(torch.autograd.Function):
    """y [...], and whatever it was computed from by integers -> y, whose gradient nobody knows."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *given: Tensor) -> Tensor:
        """Return y."""
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Raise OctavError."""
        raise OctavError("a converted model multiplies integers and has no gradient: take it in the frozen one")


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _rebuild_integer(
    root: nn.Module,
    rows: list[Any],
    name: str,
    meta: dict[str, Any],
    attributes: dict[str, Any],
    guards: Guards | None,
    kind: type | None = None,
) -> IntegerModule:
    module = IntegerModule(root, unflatten(rows), name, meta, attributes, guards)
    if kind is not None:
        module.stand_for(kind)
    # A graph that reads one tensor of a module is no reason to lose the others.
    replace_children(module, children_of(root))
    share_forward_hooks(root, module)
    return module
