"""What a frozen module computes in eval mode: integers by their definition, made from its state.

The graph rounds levels and multiplies them in float; a deployed model puts its biases on the grid of the sums, too, and
rounds once where the graph rounds three times. So that a frozen model is the deployed one to the last bit, forward is
that of a module that the passes of convert() made of a copy. It reads the parameters and buffers that stay float, and
is no child: no key of the state_dict, no parameter and no path changes.

Each graph of eval mode has one, as convert() has; while every module that the graph calls or reads is in eval mode and
none has forward hooks, as a hook on a part of the graph sees the graph's own forward; where the graph reads nothing of
what it stores, and every quantizer that it calls has a static clip or finds one for each row of data, which freezing
changes nothing of.

A change of the state makes it anew before the next call. In compiled code that is a change by load_state_dict, .to(),
train() and eval(), freeze and unfreeze; a tensor that is written into in eval mode is noticed by a call outside of it
only.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from octav_fx.capture.held import is_hooked
from octav_fx.capture.inputs import tensors_of
from octav_fx.capture.module_state import own_copy
from octav_fx.capture.symbolic.side_effects import flags_in, stored_in
from octav_fx.compat.modules import has_own_forward
from octav_fx.compat.tensors import pytree, storage_id, version_of
from octav_fx.nn.fake_quantizer import QUANTIZERS, FakeQuantizer

# Whose functions of numbers alone give numbers.
_OF_NUMBERS: Final = ("_operator", "builtins", "math")


@dataclass(frozen=True, eq=False)
class Uses:
    """What a graph uses of the module that it is of, as paths."""

    quantizers: tuple[str, ...]
    called: tuple[str, ...]
    # Tensors and attributes that it reads.
    read: tuple[str, ...]
    # What forward stores on modules: on copies nobody would find it.
    stored: tuple[str, ...]
    # Of that the plain values: path of the module, name, value.
    flags: tuple[tuple[str, str, Any], ...] = ()

    def parts(self, module: nn.Module) -> set[nn.Module]:
        """Return the modules that the graph calls, with what is below them, and those whose state it reads."""
        below = {part for path in self.called for part in module.get_submodule(path).modules()}
        return below | {module.get_submodule(path.rpartition(".")[0]) for path in self.read}

    def plain(self, module: nn.Module) -> dict[str, list[Tensor]]:
        """Return what it reads of tensors that forward has set, and that are no parameter and no buffer, by path."""
        known = {id(tensor) for tensor in _tensors(module)}
        held = {path: _held(module, path) for path in self.read}
        return {path: tensors for path, tensors in held.items() if any(id(t) not in known for t in tensors)}


def uses_of(graph: fx.Graph) -> Uses:
    """Return what a graph uses."""
    called = tuple(str(node.target) for node in graph.find_nodes(op="call_module"))
    read = tuple(str(node.target) for node in graph.find_nodes(op="get_attr"))
    quantizers = tuple(path for path in called if path.startswith(f"{QUANTIZERS}."))
    return Uses(quantizers, called, read, stored_in(graph), flags_in(graph))


class Derived:
    """A module that was made from the state of another one, and that state."""

    def __init__(self, source: nn.Module, owner: nn.Module, uses: Uses, module: Any) -> None:
        self.module, self._plain = module, tuple(uses.plain(source))
        # Numbers that the graph reads in each call, with the paths of their modules and their names.
        self._numbers = tuple(numbers_of(owner, uses.read))
        self._seen = [_Seen(tensor) for tensor in self._state(source)]

    def is_of(self, source: nn.Module) -> bool:
        """Tell whether the state is the one that the module was made from."""
        tensors = self._state(source)
        return len(tensors) == len(self._seen) and all(map(_Seen.is_same, self._seen, tensors))

    def has_numbers_of(self, owner: nn.Module) -> bool:
        """Tell whether numbers are those that the module was made from, which a compiler can follow."""
        return all(getattr(owner.get_submodule(path), name) == value for path, name, value in self._numbers)

    def _state(self, source: nn.Module) -> list[Tensor]:
        return [*_tensors(source), *(tensor for path in self._plain for tensor in _held(source, path))]


class _Seen:
    """A tensor, its memory and how often it had been written into; an address is taken by no other while both live."""

    __slots__ = ("alias", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.alias, self.version = tensor, tensor.detach(), version_of(tensor)

    def is_same(self, tensor: Tensor) -> bool:
        is_there = tensor is self.tensor and version_of(tensor) == self.version
        return is_there and storage_id(tensor) == storage_id(self.alias)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _held(module: nn.Module, path: str) -> list[Tensor]:
    """Return the tensors that are or are in an attribute; none where it is gone."""
    held: Any = module
    for name in path.split("."):
        held = getattr(held, name, None)
    return tensors_of(held)


def numbers_of(module: nn.Module, read: Iterable[str]) -> Iterator[tuple[str, str, float]]:
    """Return the floats among the attributes that a graph reads, each with the path of its module and its name."""
    for path, _, name in (each.rpartition(".") for each in read):
        value = vars(module.get_submodule(path)).get(name)
        if type(value) is float:
            yield path, name, value


def fix_numbers(graph: fx.Graph, module: nn.Module) -> None:
    """Let a graph have the present value of each float that it reads, and of what it computes from these alone."""
    read = (str(node.target) for node in graph.find_nodes(op="get_attr"))
    present = {f"{path}.{name}".lstrip("."): value for path, name, value in numbers_of(module, read)}
    known: dict[fx.Node, Any] = {}
    for node in graph.nodes if present else ():
        if node.op == "get_attr" and str(node.target) in present:
            known[node] = present[str(node.target)]
        elif _is_of(node, known):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            # An error is one of the call.
            with contextlib.suppress(ArithmeticError, ValueError):
                known[node] = node.target(*args, **kwargs)
        node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: known.get(source, source))
    for node in reversed(known):
        graph.erase_node(node)


def _is_of(node: fx.Node, known: Mapping[fx.Node, Any]) -> bool:
    """Tell whether a node computes a number of known ones alone."""
    is_of_numbers = node.op == "call_function" and getattr(node.target, "__module__", None) in _OF_NUMBERS
    return is_of_numbers and bool(node.all_input_nodes) and known.keys() >= set(node.all_input_nodes)


def is_frozen(module: nn.Module, uses: Uses) -> bool:
    """Tell whether the quantizers that a graph of a module calls are frozen, and no part is trained or observed.

    The mode of a part that the graph does not use is nothing to it: a copy of a layer of einops, which the graph does
    not call, begins in training mode.
    """
    # A rule would be made anew for each call.
    if not set(uses.stored).isdisjoint(uses.read):
        return False
    called = [module.get_submodule(path) for path in uses.quantizers]
    # What finds a clip for each row of data has none of its own, in what is deployed, too.
    if not all(isinstance(m, FakeQuantizer) and (m.clip is not None or m.by_row) for m in called):
        return False
    # Of what else a module was given for a forward the graph has traced or calls: a rule does no less.
    if all(m.clip is None for m in called) or any(map(has_own_forward, called)):
        return False
    parts = [part for part in module.modules() if part is not module]
    if any(map(is_hooked, parts)):
        return False
    training = {part for part in parts if part.training}
    return not training or training.isdisjoint(uses.parts(module))


def is_recorded(module: nn.Module, inputs: Any) -> bool:
    """Tell whether autograd will ask for gradients of a call; torch.jit.trace records none of a Python function."""
    if not torch.is_grad_enabled() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    return any(tensor.requires_grad for tensor in (*module.parameters(), *tensors_of(inputs)))


def with_gradients_of(
    simulated: Callable[..., Any], rule: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Return what rule returns, with the gradients of what the simulated forward returns: rounding has none itself."""
    with torch.no_grad():
        own_args, own_kwargs = own_copy((args, dict(kwargs)))
        values = rule(*own_args, **own_kwargs)
    return pytree.tree_map(_value_of, values, simulated(*args, **kwargs))


def with_stores_of(
    simulated: Callable[..., Any], rule: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Return what rule returns, once the simulated forward has stored what forward stores on the user's modules."""
    own_args, own_kwargs = own_copy((args, dict(kwargs)))
    simulated(*args, **kwargs)
    return rule(*own_args, **own_kwargs)


def _value_of(value: Any, simulated: Any) -> Any:
    is_recorded = isinstance(simulated, Tensor) and simulated.requires_grad
    return _StraightThrough.apply(value, simulated) if is_recorded else value


class _StraightThrough(torch.autograd.Function):
    """The first of two tensors, the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, simulated: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient
