"""What forward writes on its modules while it is traced: proxies, which nobody must find there afterwards."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from octav_fx.capture.module_state import attributes, preserved_attributes
from octav_fx.capture.symbolic.objects import is_object, proxies_in
from octav_fx.errors import NotCaptured
from octav_fx.ir.dataflow import ancestors

if TYPE_CHECKING:
    from octav_fx.capture.symbolic.tracer import ValueTracer


@contextmanager
def undone_writes(tracer: "ValueTracer", root: nn.Module) -> Iterator[None]:
    """Put back, after the trace, every attribute and buffer.

    tracer.stored names what forward keeps for later calls (a table of positions): the graph computes it anew. Raises
    NotCaptured for what it computes from its own last value: a graph has no memory.
    """
    before = {id(held): dict(held) for _, held in attributes(root)}
    objects = _objects(root)
    written: list[tuple[str, Any, list[fx.Proxy]]] = []
    with preserved_attributes(root):
        try:
            yield
        finally:
            for path, held in attributes(root):
                old = before.get(id(held), {})
                for key, value in held.items():
                    if key[:1] != "_" and (proxies := proxies_in(value)):
                        written.append((f"{path}.{key}".lstrip("."), old.get(key), proxies))
    for original, saved in objects:
        if proxies_in(original):
            original.__dict__.clear()
            original.__dict__.update(vars(saved))
    for name, old_value, proxies in written:
        if isinstance(old_value, Tensor) and len(proxies) == 1 and tracer.is_same_memory(proxies[0].node, old_value):
            # self.count += 1 assigns what it has written into.
            continue
        if isinstance(old_value, Tensor) and any(_reads(proxy.node, name) for proxy in proxies):
            raise NotCaptured(
                f"forward computes {name} from its own last value, and a graph has no memory: write into it in place"
            )
        tracer.stored.append(name)


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
