"""IntegerModule: what convert() makes of the graph of a module."""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from octav_fx.capture.classes import converted_class, users_class
from octav_fx.capture.dispatch import GuardedModule, is_traced
from octav_fx.capture.flat import flatten, unflatten
from octav_fx.capture.guards import DoesNotHold, GuardedGraph, Guards
from octav_fx.capture.module_state import is_constant
from octav_fx.compat.graphs import call_of_class
from octav_fx.compat.modules import (
    buffers_of,
    children_of,
    parameters_of,
    replace_children,
    share_forward_hooks,
    share_parts,
)
from octav_fx.compat.tensors import pytree
from octav_fx.errors import OctavError
from octav_fx.nn.fake_quantizer import QUANTIZERS
from octav_fx.nn.static import dtype_after

_HOLDS: Final = (
    "a converted model holds for the kinds of calls that the frozen one had graphs for, with static clips: call "
    "octav_fx.calibrate with batches like this call, freeze, and convert again"
)


class IntegerModule(GuardedModule):
    """A GraphModule that holds what its graph reads and no more, and that copies and pickles without being traced.

    It may have further ones for other kinds of calls: a step with a cache, or with a mask. They are no children of it,
    and their tensors are its own where they are equal.
    """

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
        further: Sequence["IntegerModule"] = (),
    ) -> None:
        super().__init__(root, graph, name)
        self.meta = dict(meta)
        self.training = False
        self._guards = guards
        self.octav_guarded = GuardedGraph(self.graph, guards)
        # Not as children: what they share is theirs under one name.
        self.__dict__["octav_further"] = tuple(further)
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

    def hold_further(self, further: Sequence["IntegerModule"]) -> None:
        """Let others run calls that this graph does not hold for. They give up tensors that are equal to its own."""
        self.__dict__["octav_further"] = tuple(further)
        for other in further:
            self.share_equal(other)

    def share_equal(self, other: "IntegerModule") -> None:
        """Let another module hold the tensors of this one where those of their names are equal."""
        own = _tensors(self)
        _share(own, other, [name for name, t in _tensors(other).items() if name in own and _is_equal(own[name], t)])

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
        return [self.octav_guarded] if "octav_guarded" in self.__dict__ else []

    def _dispatch(self, *args: Any, **kwargs: Any) -> Any:
        module = self if is_traced(args) else self._holding(args, kwargs)
        function = module.octav_guarded.function()
        if torch.compiler.is_compiling():
            return function(module, *args, **kwargs)
        try:
            return function(module, *args, **kwargs)
        except DoesNotHold as error:
            raise OctavError(f"{error}: {_HOLDS}") from error
        except RuntimeError as error:
            if self._cast_to is None:
                raise
            raise OctavError(
                f"{str(error).splitlines()[0]}: this converted model was cast to {self._cast_to}, and its integers "
                "return float32: cast before octav_fx.quantize, or call it under torch.autocast instead"
            ) from error

    def _holding(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "IntegerModule":
        """Return the module whose graph holds for a call. Raises OctavError where none does."""
        if (fault := self.octav_guarded.broken(self, args, kwargs)) is None:
            return self
        for other in self.octav_further:
            if other.octav_guarded.broken(other, args, kwargs) is None:
                return other
        raise OctavError(f"{fault}: {_HOLDS}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "IntegerModule":
        dtype = dtype_after(fn, torch.float32)
        self.__dict__["_cast_to"] = None if dtype is torch.float32 else dtype
        with self._sharing():
            super()._apply(fn, recurse)
            for other in self.octav_further:
                other._apply(fn, recurse)
        return self

    @contextmanager
    def _sharing(self) -> Iterator[None]:
        """Let further graphs read the tensors again, afterwards, that they shared with this one before."""
        own = _tensors(self)
        shared = [[name for name, t in _tensors(other).items() if t is own.get(name)] for other in self.octav_further]
        yield
        for other, names in zip(self.octav_further, shared, strict=True):
            _share(_tensors(self), other, names)

    def _of_further(self) -> dict[str, Tensor]:
        """Return the tensors that further graphs have for themselves, by names in a state_dict."""
        own = _tensors(self)
        return {
            f"octav_further.{i}.{name}": tensor
            for i, other in enumerate(self.octav_further)
            for name, tensor in _tensors(other).items()
            if tensor is not own.get(name)
        }

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, tensor in self._of_further().items():
            destination[prefix + key] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        theirs = self._of_further()
        with self._sharing():
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        for key, tensor in theirs.items():
            given = state_dict.get(prefix + key)
            if given is None:
                missing += [prefix + key] if strict else []
            elif given.shape != tensor.shape:
                errors.append(f"{prefix}{key} has the shape {tuple(given.shape)}, expected {tuple(tensor.shape)}")
            else:
                with torch.no_grad():
                    tensor.copy_(given)
        unexpected[:] = [key for key in unexpected if key.removeprefix(prefix) not in theirs]

    def check_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise OctavError for a call that the graph does not hold for: torch.export runs the graph past forward."""
        try:
            bound = inspect.signature(self.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise OctavError(f"the inputs do not fit {type(self).__name__}.forward: {error}") from error
        bound.apply_defaults()
        if (fault := self.octav_guarded.broken(self, bound.args, bound.kwargs)) is not None:
            raise OctavError(
                f"{fault}: an exported model is one graph, of the example of octav_fx.quantize or of what "
                "octav_fx.calibrate ran instead: calibrate with batches like this call alone, freeze, and convert again"
            )

    def _parts(self) -> tuple[Any, ...]:
        root = nn.Module()
        share_parts(self, root)
        share_forward_hooks(self, root)
        # Objects that the graph reads.
        vars(root).update({name: value for name, value in vars(self).items() if is_constant(name)})
        attributes, users = self.__dict__["octav_attributes"], users_class(type(self))
        kind = None if users is type(self) else users
        parts = root, flatten(self.graph), type(self).__name__, self.meta, attributes, self._guards
        return *parts, kind, self.octav_further

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _rebuild_integer, self._parts()

    def __deepcopy__(self, memo: dict[int, Any]) -> "IntegerModule":
        copied = _rebuild_integer(*copy.deepcopy(self._parts(), memo))
        memo[id(self)] = copied
        return copied


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    parameters, buffers = (f(remove_duplicate=False) for f in (module.named_parameters, module.named_buffers))
    return {**dict(parameters), **dict(buffers)}


def _share(own: Mapping[str, Tensor], other: nn.Module, names: Iterable[str]) -> None:
    """Let a module hold the very tensors of these names that another one has."""
    for path, _, name in (full.rpartition(".") for full in names):
        holder = other.get_submodule(path)
        held: Any = parameters_of(holder) if name in parameters_of(holder) else buffers_of(holder)
        held[name] = own[f"{path}.{name}" if path else name]


def _is_equal(a: Tensor, b: Tensor) -> bool:
    is_alike = type(a) is type(b) and a.dtype == b.dtype and a.device == b.device and a.layout is b.layout
    return is_alike and a.layout is torch.strided and not a.is_meta and torch.equal(a, b)


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
    further: Sequence[IntegerModule] = (),
) -> IntegerModule:
    module = IntegerModule(root, unflatten(rows), name, meta, attributes, guards, further)
    if kind is not None:
        module.stand_for(kind)
    # A graph that reads one tensor of a module is no reason to lose the others.
    replace_children(module, children_of(root))
    share_forward_hooks(root, module)
    return module
