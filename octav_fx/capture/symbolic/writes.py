"""What forward writes into tensors: nodes in their place, where nobody can hold the old value; else writes in place."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from octav_fx.capture.user_stack import user_caller
from octav_fx.compat.tensors import pytree, storage_id
from octav_fx.errors import OctavError
from octav_fx.ir.meta import fake

if TYPE_CHECKING:
    from octav_fx.capture.symbolic.proxies import ValueProxy
    from octav_fx.capture.symbolic.tracer import ValueTracer


def write(tracer: "ValueTracer", in_place: Any, apart: Any, target: "ValueProxy", other: Any) -> Any:
    """Compute target (op)= other: apart from its memory where every name of that memory can read the result."""
    names = _names_of_memory(tracer, tracer.latest_of(target.node))
    if torch.is_grad_enabled() and names is not None:
        result = apart(target, other)
        if (result.value.dtype, result.value.shape) == (target.value.dtype, target.value.shape):
            tracer.latest.update(dict.fromkeys(names, result.node))
            return target
        tracer.graph.erase_node(result.node)
    result = tracer.create_proxy("call_function", in_place, (target, other), {})
    return result if torch.is_grad_enabled() else target


def _names_of_memory(tracer: "ValueTracer", node: fx.Node) -> list[fx.Node] | None:
    """Return the nodes of the same memory; None where one is a part or another view of it, or is not the graph's.

    Whoever holds one of them, by whatever name, can then be given another node in its place.
    """
    value = fake(node)
    storage, found = storage_id(value), []
    for n in tracer.graph.nodes:
        leaves = [leaf for leaf in pytree.tree_leaves(fake(n)) if isinstance(leaf, Tensor)]
        shared = [leaf for leaf in leaves if storage_id(leaf) == storage]
        if not shared or n in tracer.latest:
            continue
        alike = fake(n) is shared[0] and (shared[0].shape, shared[0].stride()) == (value.shape, value.stride())
        if not alike or n.op in ("placeholder", "get_attr"):
            return None
        found.append(n)
    return found


def is_same_memory(tracer: "ValueTracer", node: fx.Node, tensor: Tensor | None) -> bool:
    """Tell whether a node is a tensor of a module, or is all of its memory."""
    place, value = tracer.places.get(id(tensor)), fake(node)
    if place is None or place not in tracer.attribute_nodes or not isinstance(value, Tensor):
        return False
    own = fake(tracer.attribute_nodes[place])
    return bool(own.shape == value.shape and storage_id(own) == storage_id(value))


def set_data(target: "ValueProxy", value: Any) -> None:
    """Write a value into target.data, which was assigned to it."""
    is_proxy = isinstance(value, fx.Proxy)
    own, new = target.value, value.value if is_proxy else value
    are_tensors = isinstance(own, Tensor) and isinstance(new, Tensor)
    if not are_tensors or (own.shape, own.dtype) != (new.shape, new.dtype):
        raise OctavError(f"{user_caller()}: forward sets data of a tensor to another kind of value")
    if not is_proxy or storage_id(own) != storage_id(new):
        target.data.copy_(value)
