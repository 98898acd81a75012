"""Under what a captured graph holds: what Python decided at capture, as facts that are asked of every later call.

Facts are a graph of their own. It reads arguments, attributes and sizes, and returns what is to be as it was:

    x, flag -> (kind_of(x), kind_of(flag), x.size(1) > 4, self.block.scale)    as expected: (..., True, 2.0)
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx

from octav_fx.capture.constants import Constants
from octav_fx.capture.flat import flatten, unflatten
from octav_fx.capture.kinds import kind_of, kind_of_attribute, kind_of_number
from octav_fx.capture.module_state import own_copy, tensors_within
from octav_fx.capture.permits import permitted
from octav_fx.compat.graphs import function_of
from octav_fx.compat.tensors import (
    FakeTensor,
    FakeTensorMode,
    dtypes_around,
    pytree,
    quiet,
    sample_of,
    without_transforms,
)
from octav_fx.errors import OctavError
from octav_fx.ir.dataflow import constants, value_of
from octav_fx.ir.ops import in_place

# So many kinds of calls a graph remembers an answer for.
_REMEMBERED: Final = 1024


class DoesNotHold(OctavError):
    """Raised by a graph in which a value is not what it was at capture."""


class Unexpected(Exception):
    """Raised where a value is not what it was at capture."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where


@fx.node.has_side_effect
def expect(value: Any, expected: Any, where: str) -> None:
    """Raise Unexpected where a value is not what it was at capture."""
    if not is_expected(value, expected):
        raise Unexpected(_told(value, expected, where))


@dataclass(eq=False)
class Facts:
    """Values that a graph computes from the arguments of forward, and what they were at capture.

    Those that forward computes on its way the graph asks for itself, by expect(), and returns nothing: with one that
    is not as it was, what is computed from it later need not run at all.
    """

    graph: fx.Graph
    expected: tuple[Any, ...] = ()
    # Who asked, as file:line or in words.
    where: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Not when it is first asked: a compiler may ask, and cannot follow.
        self._function = function_of(self.graph)

    def broken(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Say which value is not what it was at capture, or return None."""
        try:
            values = self._function(module, *args, **kwargs)
        except Unexpected as error:
            return error.where
        except AttributeError as error:
            # Deleted since.
            return str(error)
        for value, expected, where in zip(values, self.expected, self.where, strict=True):
            if not is_expected(value, expected):
                return _told(value, expected, where)
        return None

    def changed(self, module: Any) -> str | None:
        """Name an attribute, modes aside, that is not of the kind it was at capture, or return None."""
        (asked,) = next(iter(self.graph.find_nodes(op="output"))).args
        for node, expected in zip(asked, self.expected, strict=True):
            source = node.args[0] if node.target is kind_of else None
            if not isinstance(source, fx.Node) or source.op != "get_attr":
                continue
            path = str(source.target)
            holder, _, name = path.rpartition(".")
            if name != "training" and kind_of_attribute(_get(module, holder), name) != expected:
                return path.removeprefix("_float_module.")
        return None

    def numbers(self, module: Any) -> set[str]:
        """Return the paths of attributes that were another float at capture, or may be any."""
        (asked,) = next(iter(self.graph.find_nodes(op="output"))).args
        found = set()
        for node, expected in zip(asked, self.expected, strict=True):
            source = node.args[0] if node.target in (kind_of, kind_of_number) else None
            if not isinstance(source, fx.Node) or source.op != "get_attr":
                continue
            holder, _, name = str(source.target).rpartition(".")
            now = vars(_get(module, holder)).get(name)
            was_float = isinstance(expected, tuple) and expected[:1] == ("float",)
            if type(now) is float and was_float and (node.target is kind_of_number or kind_of(now) != expected):
                found.add(str(source.target).removeprefix("_float_module."))
        return found

    def of_state(self, module: Any) -> "Facts":
        """Return the same facts with the sizes and numbers that the state of a module alone decides in them."""
        facts = _restored(flatten(self.graph), self.expected, self.where)
        known = {node: value_of(module, node) for node in constants(facts.graph)}
        numbers = {node: value for node, value in known.items() if not isinstance(value, Tensor)}

        def as_number(node: fx.Node) -> Any:
            value = numbers.get(node, node)
            return tuple(value) if isinstance(value, torch.Size) else value

        for node in facts.graph.nodes:
            node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), as_number)
        for node in reversed(facts.graph.nodes):
            if node in known and not node.users:
                facts.graph.erase_node(node)
        return Facts(facts.graph, facts.expected, facts.where)

    def __reduce__(self) -> Any:
        return _restored, (flatten(self.graph), self.expected, self.where)


@dataclass(eq=False)
class Guards:
    """What holds of each call that a graph may run for."""

    # Kinds of the arguments: asked first, since only what is of its kind can be asked for a size.
    arguments: Facts
    # Kinds of plain attributes that forward read, modes among them.
    attributes: Facts | None = None
    # Known from the sizes of the arguments.
    sizes: Facts | None = None
    # Of what forward computes on its way: found without data, and remembered for each kind of call.
    deep: Facts | None = None
    # Dtypes of what it computes once it has written into an argument (a cache): found so on copies, and remembered for
    # each kind of dtypes. Sizes grow with every token; those the graph checks as it runs.
    dtypes: Facts | None = None
    _known: dict[Any, str | None] = field(default_factory=dict)

    def broken(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, deeply: bool = True) -> str | None:
        """Say which guard does not hold for a call of the module, or return None; deeply: the deep ones, too."""
        for facts in (self.arguments, self.attributes, self.sizes):
            if facts is not None and (fault := facts.broken(module, args, kwargs)) is not None:
                return fault
        if not deeply or (self.deep is None and self.dtypes is None):
            return None
        if torch.compiler.is_compiling():
            # Part of the compiled graph, where nobody reads the tensors: they are never computed.
            with torch.no_grad(), permitted():
                return None if self.deep is None else self.deep.broken(module, args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        for facts, kind_of_call in ((self.deep, _kind_of_call), (self.dtypes, _dtypes_of_call)):
            if facts is None:
                continue
            key = kind_of_call(leaves)
            if key not in self._known:
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                self._known[key] = _fault_without_data(facts, module, leaves, spec)
            if (fault := self._known[key]) is not None:
                return fault
        return None

    def hold_for(self, arguments: Sequence[Any]) -> None:
        """Know that the guards hold for arguments in the order of forward: those of the capture."""
        leaves = pytree.tree_leaves(arguments)
        self._known[_kind_of_call(leaves)] = self._known[_dtypes_of_call(leaves)] = None

    def forget(self) -> None:
        """Ask anew what forward computes on its way: its parameters have another dtype."""
        self._known.clear()

    def of_inputs(self, module: Any) -> "Guards":
        """Return the guards that ask arguments alone; of what a graph computes, its own checks are left.

        module: what they are of, whose state stays as it is; of its tensors no sizes are asked later.
        """
        sizes = None if self.sizes is None else self.sizes.of_state(module)
        asks_state = sizes is not None and sizes.graph.find_nodes(op="get_attr")
        return Guards(self.arguments, None, None if asks_state else sizes)

    def __reduce__(self) -> Any:
        return Guards, (self.arguments, self.attributes, self.sizes, self.deep, self.dtypes)


@dataclass(eq=False)
class GuardedGraph:
    """A captured graph, and under what it holds; None: under anything."""

    graph: fx.Graph
    guards: Guards | None = None
    # Dicts that forward fills, and the graph does not.
    caches: tuple[str, ...] = ()
    _function: Callable[..., Any] | None = None
    _written: set[str] | None = None
    _constants: Constants | None = None
    # While the module is frozen, what the graph computes instead, a Derived, and what that depends on, a Uses: see
    # capture/frozen.py.
    derived: Any = None
    uses: Any = None
    # Why it does not hold although its guards do, by the kind of a call.
    _refused: dict[Any, str] = field(default_factory=dict)

    def function(self) -> Callable[..., Any]:
        """Return the graph as a function of the module and the arguments of forward."""
        if self._function is None:
            self._function = function_of(self.graph)
        return self._function

    def written(self) -> set[str]:
        """Return the names of the parameters, buffers and attributes that the graph writes into."""
        if self._written is None:
            self._written = {name for node in self.graph.nodes if (name := _read_from(node)) and in_place(node)}
        return self._written

    def changed(self, module: Any) -> str | None:
        """Name an attribute that forward read, and that a later call or the user has made another one; or None."""
        facts = None if self.guards is None else self.guards.attributes
        return None if facts is None else facts.changed(module)

    def numbers(self, module: Any) -> set[str]:
        """Return the paths of floats that forward read, and that are others since, or that the graph reads."""
        facts = None if self.guards is None else self.guards.attributes
        return set() if facts is None else facts.numbers(module)

    @property
    def asks_for_gradients(self) -> bool:
        """Tell whether the graph holds in one gradient mode only."""
        facts = None if self.guards is None else self.guards.attributes
        return facts is not None and bool(facts.graph.find_nodes(op="call_function", target=torch.is_grad_enabled))

    def set_function(self, function: Callable[..., Any]) -> None:
        """Run a function that was generated for the graph elsewhere."""
        self._function = function

    def broken(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, deeply: bool = True) -> str | None:
        """Say why the graph does not hold for a call of the module, or return None.

        deeply: ask what it computes on its way, too; without that the checks in it raise OctavError when it runs.
        """
        if (change := self.change_of_constants()) is not None:
            return change
        if self._refused:
            reason = self._refused.get(_kind_of_call(pytree.tree_leaves((args, kwargs))))
            if reason is not None:
                return reason
        return None if self.guards is None else self.guards.broken(module, args, kwargs, deeply=deeply)

    @contextmanager
    def refused(self, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Iterator[None]:
        """Let the graph not hold for calls of this kind; after an error inside it does again."""
        key = _kind_of_call(pytree.tree_leaves((args, kwargs)))
        self._refused[key] = reason
        try:
            yield
        except BaseException:
            del self._refused[key]
            raise

    def change_of_constants(self) -> str | None:
        """Say which layer is set otherwise, or which global is another one, than at capture; or return None."""
        return None if self._constants is None else self._constants.change()

    def hold_constants(self, constants: Constants) -> None:
        """Let the graph hold for layers as they are set, and for globals as they are."""
        self._constants = constants

    def __reduce__(self) -> Any:
        return _restored_graph, (flatten(self.graph), self.guards, self.caches)


def _fault_without_data(facts: Facts, module: Any, leaves: list[Any], spec: Any) -> str | None:
    """Say which of the facts does not hold for arguments, whose tensors are taken for fake ones; or return None."""
    mode = next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    # What forward computes is asked of the layers themselves.
    with torch.no_grad(), permitted(), quiet(), without_transforms():
        leaves = [sample_of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        # Objects, a cache, are copied: what is computed here writes into them.
        fakes = [mode.from_tensor(leaf) if _is_real(leaf) else own_copy(leaf) for leaf in leaves]
        fake_args, fake_kwargs = pytree.tree_unflatten(fakes, spec)
        try:
            with mode:
                return facts.broken(module, fake_args, fake_kwargs)
        except Exception as error:
            # With sizes of the example in it, what a later value is computed from need not run at all.
            return f"what it computes sizes from fails: {error}"
        finally:
            # Under autocast it has casts of weights by now, and they are fake.
            torch.clear_autocast_cache()


def _dtypes_of_call(leaves: list[Any]) -> tuple[Any, ...]:
    return tuple(tensor.dtype for leaf in leaves for tensor in tensors_within(leaf)), dtypes_around()


def _kind_of_call(leaves: list[Any]) -> tuple[Any, ...]:
    shapes = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves if isinstance(leaf, Tensor))
    return shapes, dtypes_around()


def _restored(rows: list[Any], expected: tuple[Any, ...], where: tuple[str, ...]) -> Facts:
    return Facts(unflatten(rows), expected, where)


def _restored_graph(rows: list[Any], guards: Guards | None, caches: tuple[str, ...] = ()) -> GuardedGraph:
    restored = GuardedGraph(unflatten(rows), guards, caches)
    restored.function()
    return restored


def _read_from(node: fx.Node) -> str | None:
    """Return the name of the tensor that a write goes to, through views of it; None for no tensor of a module."""
    target: Any = node if node.op != "get_attr" else None
    while isinstance(target, fx.Node) and target.op in ("call_function", "call_method") and target.args:
        target = target.args[0]
    return str(target.target) if isinstance(target, fx.Node) and target.op == "get_attr" else None


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


def _get(module: Any, path: str) -> Any:
    return functools.reduce(getattr, path.split(".") if path else (), module)


def is_expected(value: Any, expected: Any) -> bool:
    """Tell whether a value is what it was at capture."""
    if value is expected:
        return True
    if isinstance(expected, bool):
        # A branch, at which a compiler decides; by `is` its symbol is never the bool that it stands for.
        return expected if value else not expected
    return bool(value == expected)


def _told(value: Any, expected: Any, where: str) -> str:
    # What a compiler takes a number for may have no text.
    return where if torch.compiler.is_compiling() else f"{where}: {_text(expected)} at capture, {_text(value)} now"


def _text(kind: Any) -> str:
    match kind:
        case (("Tensor" | "Parameter") as name, int() as axes, *_):
            return f"a {name.lower()} of {axes} axes"
        case (str(), value):
            kind = value
    text = repr(kind)
    return text if len(text) <= 80 else f"{text[:77]}..."
