"""Calls that no graph can hold: the module runs its own Python, over quantized children and the same state.

The children are quantized in a second tree of modules. It has the parameters, buffers and hooks of the first, the very
dicts, and its quantizers are those of the module where it has one for the same operand, else new ones of the module.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from octav_fx.capture.classes import stand_in, users_class
from octav_fx.capture.held import let_go
from octav_fx.capture.inputs import Inputs, call_of
from octav_fx.capture.modules import QuantizedModule, quantized_modules
from octav_fx.capture.partial import ATTRIBUTES, float_records
from octav_fx.capture.rerun import macs_by_module
from octav_fx.capture.whole import users_own
from octav_fx.compat.modules import HOOK_ATTRIBUTES, PART_ATTRIBUTES, children_of, not_compiled
from octav_fx.compat.tensors import pytree
from octav_fx.errors import OctavError
from octav_fx.ir.records import Record
from octav_fx.nn.fake_quantizer import QUANTIZERS
from octav_fx.training.by_parts import PartsQuantizer
from octav_fx.training.known_quantizers import quantizers_by_operand, take_quantizers
from octav_fx.training.one_graph import NeedsCalls, Recipe

_PARTS = frozenset({*PART_ATTRIBUTES, *HOOK_ATTRIBUTES, *ATTRIBUTES, "_non_persistent_buffers_set"})


@dataclass(eq=False)
class OwnPython:
    """What a module runs in place of a graph."""

    quantized: QuantizedModule
    # Each module of the first tree, and what stands for it in the second; the outermost is the first.
    pairs: list[tuple[nn.Module, nn.Module]]
    # What the second tree has in place of children.
    parts: list[QuantizedModule]
    # What it multiplies.
    rows: list[Record]

    @torch.compiler.disable(
        recursive=False, reason="octav_fx: no graph holds this call, the module runs its own Python"
    )
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run forward; attributes that were set on either tree since are those of both.

        Under torch.compile forward is compiled by itself, behind a break of the graph around it.
        """
        if not self.pairs:
            return not_compiled(functools.partial(self._float, args, kwargs))
        forward, call, after = not_compiled(functools.partial(self._before, args, kwargs))
        try:
            return forward(*call.args, **call.kwargs)
        finally:
            not_compiled(after.close)

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Callable[..., Any], Inputs, ExitStack]:
        """Return what to call, with what, and what is to be done after it."""
        with ExitStack() as after:
            after.callback(self._copy_back)
            for first, second in self.pairs:
                _copy_attributes(first, second)
            for part in self.parts:
                part.follow(part.owner.training)
            forward = after.enter_context(_below_what_wraps(self.pairs[0][1]))
            return forward, call_of(self.quantized.owner, args, kwargs), after.pop_all()

    def _float(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = call_of(self.quantized.owner, args, kwargs)
        return self.quantized.float_forward(*call.args, **call.kwargs)

    def _copy_back(self) -> None:
        for first, second in self.pairs:
            _copy_attributes(second, first)


def own_python(quantized: QuantizedModule, call: Inputs, recipe: Recipe, reason: OctavError) -> OwnPython:
    """Make what runs a module's own Python over quantized children.

    reason: why no graph holds the call. Raises OctavError where none of what multiplies can be quantized.
    """
    first = quantized.owner
    with users_own(first):
        work = macs_by_module(first, call)
        if not work:
            return OwnPython(quantized, [], [], [])
        second = _sharing_copy(first)
        pairs = list(zip(first.modules(), second.modules(), strict=True))
    for module in second.modules():
        let_go(module)
    position = recipe.position
    # What lies outside of this module holds the first and the last layer, unless this one does.
    before, after = [] if position.holds_first else [("", 0)], [] if position.holds_last else [("", 0)]
    parts = PartsQuantizer(
        recipe.config,
        recipe.user,
        settings=position.settings,
        macs_by_module=[*before, *((_join(position.path, at), macs) for at, macs in work), *after],
        workers={id(second.get_submodule(at)) for at, _ in work},
    )
    if isinstance(reason, NeedsCalls):
        parts.find_settings(second, call, position.path)
    parts.descend(second, [call], position.path, str(reason))
    graphs = quantized_modules(second)
    _share_quantizers(quantized, graphs)
    rows = [*float_records(second), *(row for part in graphs for row in part.records)]
    return OwnPython(quantized, pairs, graphs, rows)


class _Wrapped:
    """Marks a class whose forward the user's class has wrapped, while what is inside of it runs."""


@functools.cache
def _wrapped_class(kind: Any) -> type[nn.Module] | None:
    """Return a subclass of a user's class that wraps the forward of each one; None for a class that does not."""

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    made = stand_in(kind, _Wrapped, forward)
    return made if vars(made)["forward"] is not forward else None


@contextmanager
def _below_what_wraps(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """Give the forward of a module, to which it is inside as if it were called from that of a subclass.

    A class that wraps the forward of each subclass, to recompute it in backward, has wrapped that of the graphs, too:
    it has done so around this call, and does it once.
    """
    kind: Any = type(module)
    wrapped = _wrapped_class(users_class(kind)) if "forward" not in vars(module) else None
    if wrapped is None:
        yield module.forward
        return
    module.__class__ = wrapped
    try:
        yield functools.partial(kind.forward, module)
    finally:
        module.__class__ = kind


def _sharing_copy(module: nn.Module) -> nn.Module:
    """Copy a tree of modules that goes on sharing parameters, buffers, hooks and tensors with the first."""
    memo: dict[int, Any] = {}
    for held in module.modules():
        for name, value in vars(held).items():
            if name in _PARTS and name != "_modules":
                memo[id(value)] = value
            else:
                memo |= {id(leaf): leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise OctavError(f"{type(module).__name__} cannot be copied (copy.deepcopy): {error}") from error


def _copy_attributes(source: nn.Module, target: nn.Module) -> None:
    """Let a module have the plain attributes of another one: what forward stores and what users set."""
    for name, value in vars(source).items():
        if (
            source is not target
            and name not in _PARTS
            and not any(isinstance(leaf, nn.Module) for leaf in pytree.tree_leaves(value))
        ):
            target.__dict__[name] = value


def _share_quantizers(quantized: QuantizedModule, graphs: list[QuantizedModule]) -> None:
    """Give the graphs the quantizers of a module by the operands they are for, and the module those that it lacks."""
    own: Any = children_of(quantized)[QUANTIZERS]
    known = quantizers_by_operand(quantized)
    for graph in graphs:
        for operand, quantizer in take_quantizers(graph, known):
            base = "_".join(operand).replace(".", "_").replace(":", "_")
            free = next(n for n in (base, *(f"{base}_{i}" for i in range(1, 1000))) if not hasattr(own, n))
            own.add_module(free, quantizer)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
