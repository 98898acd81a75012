"""What forward computes under no_grad, whose results are detached: a graph has no modes."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from octav_fx.ir.dataflow import holds_tensor, is_value_source
from octav_fx.ir.meta import fake
from octav_fx.ir.ops import in_place

if TYPE_CHECKING:
    from octav_fx.capture.symbolic.tracer import ValueTracer


def without_gradient(tracer: "ValueTracer", proxy: Any) -> Any:
    """Return a proxy for a result, or a tuple of them, that no gradient goes through."""
    node, value = proxy.node, proxy.value
    if isinstance(value, tuple) and holds_tensor(node) and _has_gradient(tracer, node):
        proxy.count_pieces()
        items = [proxy[i] for i in range(len(value))]
        is_named = hasattr(value, "_fields")
        return type(value)(*items) if is_named else type(value)(items)
    if not (isinstance(value, Tensor) and value.is_floating_point() and _has_gradient(tracer, node)):
        return proxy
    return _written_past_autograd(tracer, proxy) if _writes(tracer, node) else tracer.detached(proxy)


def _written_past_autograd(tracer: "ValueTracer", proxy: Any) -> Any:
    """Let a write take part in no gradient; that it happened is counted, and backward sees that."""
    node = proxy.node
    target = node.args[0] if node.args else None
    for source in [source for source in node.all_input_nodes if _has_gradient(tracer, source)]:
        with tracer.graph.inserting_before(node):
            past = tracer.detached(tracer.proxy(source))
        node.replace_input_with(source, past.node)
    tracer.gradients.pop(node, None)
    return tracer.proxy(target) if isinstance(target, fx.Node) and fake(target) is fake(node) else proxy


def _has_gradient(tracer: "ValueTracer", node: fx.Node) -> bool:
    known = tracer.gradients
    if node not in known:
        is_cut = not holds_tensor(node) or (node.op == "call_method" and node.target == "detach")
        known[node] = not is_cut and (
            is_value_source(node, tracer.root) or any(_has_gradient(tracer, source) for source in node.all_input_nodes)
        )
    return known[node]


def _writes(tracer: "ValueTracer", node: fx.Node) -> bool:
    called = tracer.values.called(node)
    return in_place(node) if called is None else bool(getattr(called, "inplace", False))
