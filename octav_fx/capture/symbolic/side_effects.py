"""What forward writes on its modules while it is traced: proxies, which nobody must find there afterwards."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx, nn

from octav_fx.capture.contents import attributes
from octav_fx.capture.kinds import PLAIN, kind_of
from octav_fx.capture.module_state import is_constant, preserved_attributes
from octav_fx.capture.symbolic.objects import is_object, proxies_in
from octav_fx.capture.symbolic.reads import INTERNAL
from octav_fx.capture.symbolic.writes import is_same_memory
from octav_fx.errors import NotCaptured
from octav_fx.ir.dataflow import ancestors
from octav_fx.ir.meta import fake, set_fake

if TYPE_CHECKING:
    from octav_fx.capture.symbolic.tracer import ValueTracer

# Where a quantized module has the module that it was made of.
FLOAT_MODULE: Final = "_float_module"


@contextmanager
def undone_writes(tracer: "ValueTracer", root: nn.Module) -> Iterator[None]:
    """Put back, after the trace, every attribute and buffer; the graph stores at each call what forward stored.

    tracer.stored names that: a table of positions for later calls, an auxiliary loss. Raises NotCaptured for what
    forward computes from its own last value: a graph has no memory.
    """
    before = {id(held): dict(held) for _, held in attributes(root)}
    contents = {id(value): dict(value) for old in before.values() for value in old.values() if isinstance(value, dict)}
    objects = _objects(root)
    written: list[tuple[str, str, Any, Any, bool]] = []
    with preserved_attributes(root):
        try:
            yield
            for path, held in attributes(root):
                for key, value in held.items():
                    if key not in INTERNAL and proxies_in(value):
                        old = before.get(id(held), {}).get(key)
                        known = contents.get(id(value)) if value is old else None
                        # What is new in a dict that was there, or all of what was set.
                        new = value if known is None else {k: v for k, v in value.items() if v is not known.get(k)}
                        written.append((path, key, old, new, known is not None))
                    elif _is_flag(tracer, root.get_submodule(path), key, value):
                        written.append((path, key, None, value, False))
            for row in written:
                _store(tracer, *row)
        finally:
            # Set on root by the tracer, also for what is stored: they are the graph's.
            own = before[id(vars(root))]
            tracer.made = {name: v for name, v in vars(root).items() if name not in own and is_constant(name)}
            for name in tracer.made:
                del vars(root)[name]
            for original, saved in objects:
                if proxies_in(original):
                    original.__dict__.clear()
                    original.__dict__.update(vars(saved))


def _is_flag(tracer: "ValueTracer", module: nn.Module, key: str, value: Any) -> bool:
    """Tell whether an attribute is plain and was set, not read before: the user reads it, or the next forward."""
    return (module, key) in tracer.set_first and key not in INTERNAL and not is_constant(key) and _is_plain(value)


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple, dict):
        return all(map(_is_plain, (*value, *value.values()) if isinstance(value, dict) else value))
    return isinstance(value, PLAIN)


def is_cache(held: Any, kind: Any, decided: set[fx.Node]) -> bool:
    """Tell whether a dict has got nothing since it was of a kind but what nodes give that state alone decides.

    if device not in self.cache: self.cache[device] = self.bias[:, self.index]
    """
    if type(held) is not dict:
        return False
    new = [item.node for item in held.values() if isinstance(item, fx.Proxy)]
    old = {key: item for key, item in held.items() if not isinstance(item, fx.Proxy)}
    return bool(new) and decided.issuperset(new) and kind_of(old) == kind


def _store(tracer: "ValueTracer", path: str, key: str, old: Any, new: Any, was_updated: bool) -> None:
    """Store a value before the graph returns."""
    if (tracer.root.get_submodule(path), key) in tracer.caches:
        return
    name = f"{path}.{key}".lstrip(".")
    proxies = proxies_in(new)
    if isinstance(old, Tensor) and len(proxies) == 1 and is_same_memory(tracer, proxies[0].node, old):
        # self.count += 1 assigns what it has written into.
        return
    was_read = (tracer.root.get_submodule(path), key) in tracer.read_first
    if isinstance(old, Tensor) and was_read and any(_reads(proxy.node, name) for proxy in proxies):
        raise NotCaptured(
            f"forward computes {name} from its own last value, and a graph has no memory: write into it in place"
        )
    tracer.stored.append(name)
    if (
        was_read
        and isinstance(old, Tensor)
        and len(proxies) == 1
        and old.shape != getattr(fake(proxies[0].node), "shape", None)
    ):
        tracer.resized.append(name)
    output = next(iter(tracer.graph.find_nodes(op="output")))
    with tracer.graph.inserting_before(output):
        value = tracer.create_arg(new)
        # Of the outermost module the one that holds what users set: a quantized module reads through to it.
        owner = tracer.graph.create_node("get_attr", path or FLOAT_MODULE)
        # A new dict in place of an old one is set, what was put into the old one is put into it.
        function = update_ if was_updated else store_
        for node in (owner, tracer.graph.call_function(function, (owner, key, value))):
            set_fake(node, None)


@fx.node.has_side_effect
def store_(owner: nn.Module, name: str, value: Any) -> None:
    """Set an attribute, as forward did; not in a program that is exported, which has no modules."""
    if not torch.compiler.is_exporting():
        setattr(owner, name, value)


@fx.node.has_side_effect
def update_(owner: nn.Module, name: str, items: dict[Any, Any]) -> None:
    """Put items into a dict that is an attribute, as forward did; not in a program that is exported."""
    if not torch.compiler.is_exporting():
        getattr(owner, name).update(items)


def stored_in(graph: fx.Graph) -> tuple[str, ...]:
    """Return the paths of what forward computes and stores on the user's modules."""
    nodes = [node for target in (store_, update_) for node in graph.find_nodes(op="call_function", target=target)]
    owners = [(str(node.args[0].target), str(node.args[1])) for node in nodes if len(node.all_input_nodes) > 1]
    return tuple(name if owner == FLOAT_MODULE else f"{owner}.{name}" for owner, name in owners)


def flags_in(graph: fx.Graph) -> tuple[tuple[str, str, Any], ...]:
    """Return the plain values that forward stores in each call: (path of the module, name, value)."""
    nodes = graph.find_nodes(op="call_function", target=store_)
    rows = [(node.all_input_nodes[0].target, *node.args[1:]) for node in nodes if len(node.all_input_nodes) == 1]
    return tuple(("" if path == FLOAT_MODULE else str(path), str(name), value) for path, name, value in rows)


def store_flags(root: nn.Module, flags: tuple[tuple[str, str, Any], ...]) -> None:
    """Store plain values as a graph does that is not run."""
    for path, name, value in flags:
        setattr(root.get_submodule(path), name, _thawed(value))


def _thawed(value: Any) -> Any:
    """Return a value with plain lists and dicts for those of a graph's arguments, which nobody may change."""
    if isinstance(value, dict):
        return {key: _thawed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(_thawed, value))
    return value


def drop_stores(graph: fx.Graph) -> None:
    """Take what forward stores out of a graph that is no longer part of the user's modules."""
    for target in (store_, update_):
        for node in graph.find_nodes(op="call_function", target=target):
            owner = node.args[0]
            graph.erase_node(node)
            if isinstance(owner, fx.Node) and not owner.users:
                graph.erase_node(owner)


def _objects(root: nn.Module) -> list[tuple[Any, Any]]:
    """Return the user's objects that modules hold, a cache or a log, each with a copy of what it holds now."""
    known: dict[int, Any] = {id(m): m for m in root.modules()}
    known |= {id(t): t for t in (*root.parameters(), *root.buffers())}
    held = {id(value): value for _, values in attributes(root) for value in values.values() if is_object(value)}
    found = []
    for value in held.values():
        try:
            found.append((value, copy.deepcopy(value, dict(known))))
        except Exception:
            # What cannot be copied (a lock, a file) is nothing that forward puts tensors into.
            continue
    return found


def _reads(node: fx.Node, name: str) -> bool:
    """Tell whether a node is computed from an attribute; tensors that are no buffers have lost their names."""
    return any(
        source.op == "get_attr" and (source.target == name or str(source.target).startswith("_tensor_constant"))
        for source in ancestors(node)
    )
