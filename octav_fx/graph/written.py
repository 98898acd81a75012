"""What forward writes on its modules while it is traced: proxies, which nobody must find there afterwards."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, fx, nn

from octav_fx.errors import NotCaptured
from octav_fx.graph.rebuild import proxies_in

if TYPE_CHECKING:
    from octav_fx.graph.tracer import ValueTracer

_CONTAINERS: Final = (list, dict, set)


@contextmanager
def unwritten(tracer: "ValueTracer", root: nn.Module) -> Iterator[None]:
    """Afterwards every attribute and buffer is what it was before the trace.

    tracer.stored names what forward keeps for later calls (a table of positions): the graph computes it anew. Raises
    NotCaptured for what it computes from its own last value: a graph has no memory.
    """
    before = {
        name: [(held, dict(held), _contents(held)) for held in (module.__dict__, module._buffers)]
        for name, module in root.named_modules()
    }
    written: list[tuple[str, Any, list[fx.Proxy]]] = []
    try:
        yield
    finally:
        for name, states in before.items():
            for held, old, contents in states:
                for key in [key for key in held if key not in _OF_MODULES]:
                    if proxies := proxies_in(held[key]):
                        written.append((f"{name}.{key}".lstrip("."), old.get(key), proxies))
                        _put_back(held, old, contents, key)
    for name, old_value, proxies in written:
        if isinstance(old_value, Tensor) and any(_reads(proxy.node, name) for proxy in proxies):
            raise NotCaptured(
                f"forward computes {name} from its own last value, and a graph has no memory: write into it in place"
            )
        tracer.stored.append(name)


# Where a module holds its parts.
_OF_MODULES: Final = ("_modules", "_parameters", "_buffers")


def _contents(held: dict[str, Any]) -> dict[str, Any]:
    """A copy of each container, which forward may add to."""
    return {key: copy.copy(value) for key, value in held.items() if type(value) in _CONTAINERS and key[:1] != "_"}


def _put_back(held: dict[str, Any], old: dict[str, Any], contents: dict[str, Any], key: str) -> None:
    if key not in old:
        del held[key]
        return
    held[key] = old[key]
    if key in contents:
        held[key].clear()
        getattr(held[key], "extend" if isinstance(held[key], list) else "update")(contents[key])


def _reads(node: fx.Node, name: str) -> bool:
    """Whether a node is computed from an attribute; tensors that are no buffers have lost their names."""
    pending, seen = [node], {node}
    while pending:
        reached = pending.pop()
        if reached.op == "get_attr" and (reached.target == name or str(reached.target).startswith("_tensor_constant")):
            return True
        new = [source for source in reached.all_input_nodes if source not in seen]
        seen.update(new)
        pending += new
    return False
