"""What quantize() makes sure of: a graph computes what the float module does, also in calls unlike the example.

example, another batch of another length, example again    -> the same results, and the same state afterwards
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from octav_fx.capture.contents import Contents
from octav_fx.capture.guards import GuardedGraph
from octav_fx.capture.inputs import Inputs
from octav_fx.capture.module_state import own_copy, preserved_attributes
from octav_fx.capture.modules import QuantizedModule, graphs_of
from octav_fx.capture.permits import permitted
from octav_fx.capture.rerun import (
    difference,
    difference_where_written,
    has_data,
    preserved_modes,
    preserved_tensors,
    run_keeping_state,
    run_once,
    unwritten_as_nan,
    without_quantizers,
)
from octav_fx.capture.whole import users_own
from octav_fx.compat.tensors import pytree
from octav_fx.errors import NotCaptured
from octav_fx.ir.meta import info
from octav_fx.nn import FakeQuantizer

# An image is cut to about half by a multiple of so many pixels, if it has two of them: what halves it five times takes
# the rest.
_PIXELS: Final = 32


def check_in_turn(module: nn.Module, example: Inputs, is_folded: bool) -> None:
    """Check graphs of a module on a call of another size that the module takes, and then on the example.

    Where its Python branches on the mode, the other mode is checked on the example; not training mode if batch norms
    are folded: they have the statistics of eval mode there, as was asked for. What no graph holds for is left out: a
    graph for it is compared when it is captured. Raises NotCaptured where something else is computed, with the first
    layer whose result differs; does nothing without data (meta device).
    """
    quantized = graphs_of(module)
    assert quantized is not None
    if not has_data(module, example):
        return
    for variation in (*_variations(example), example):
        if _is_compared(quantized, [variation, example]):
            break
    if len(quantized.modes) == 2 and (quantized.training or not is_folded):
        # Graphs run as functions here.
        with quantized.keeping_code(), preserved_modes(module):
            module.train(not quantized.training)
            _is_compared(quantized, [example])


class _NoGraph(Exception):
    """Raised where a call has changed the state so that the graph for the next call holds no more."""


def _is_compared(quantized: QuantizedModule, calls: list[Inputs]) -> bool:
    """Compare calls in turn; tell whether there are graphs for them and the float module takes them."""
    # What a graph computes on its way its own checks ask: to ask for it beforehand takes as long as a trace.
    graphs = _holding(quantized, calls, deeply=False)
    try:
        return graphs is not None and _is_equal(quantized, calls, graphs)
    except NotCaptured:
        asked = _holding(quantized, calls, deeply=True)
        if asked == graphs:
            raise
        return asked is not None and _is_equal(quantized, calls, asked)


def _holding(quantized: QuantizedModule, calls: list[Inputs], *, deeply: bool) -> list[GuardedGraph] | None:
    """Return the graph that holds for each call; None where one has none."""
    graphs = [quantized.holding(*call, deeply=deeply) for call in calls]
    held = [guarded for guarded in graphs if guarded is not None]
    return held if len(held) == len(calls) else None


def _is_equal(quantized: QuantizedModule, calls: list[Inputs], graphs: list[GuardedGraph]) -> bool:
    """Compare calls of graphs in turn; tell whether the float module takes them, and does the same each time."""
    owner = quantized.owner
    unkept = {name for guarded in graphs for name in guarded.caches}
    gradients = any(guarded.asks_for_gradients for guarded in graphs) and torch.is_grad_enabled()

    def run(guarded: GuardedGraph, *args: Any, **kwargs: Any) -> Any:
        if guarded.broken(owner, args, kwargs, deeply=False) is not None:
            raise _NoGraph
        return guarded.function()(owner, *args, **kwargs)

    def float_results(at_least: int) -> list[Any]:
        return _results(quantized, calls, [quantized.float_forward] * len(calls), gradients, unkept, at_least)

    def graph_results(at_least: int) -> list[Any]:
        runs: list[Callable[..., Any]] = [functools.partial(run, guarded) for guarded in graphs]
        with without_quantizers(owner):
            return _results(quantized, calls, runs, gradients, unkept, at_least)

    # A part of it may be quantized already.
    with users_own(owner, but=owner):
        try:
            expected = float_results(at_least=1)
        except Exception:
            return False
        try:
            found = graph_results(len(expected) - 1)
        except _NoGraph:
            return True
        except Exception as error:
            raise NotCaptured(f"the captured graph does not run on a call that the model takes: {error}") from error
        made = len(found) - 1
        if len(expected) < len(found):
            expected = float_results(made)
        places = [*zip(calls[:made], graphs[:made], strict=True), (calls[-1], graphs[-1])]
        for (call, guarded), one, other in zip(places, expected, found, strict=True):
            if (detail := difference(one, other)) is not None:
                if difference(expected, float_results(made)) is not None:
                    # Rows that nothing writes (a grouped product), or a count in a closure: it differs from itself.
                    return False
                with unwritten_as_nan():
                    if difference_where_written(float_results(made), graph_results(made)) is None:
                        # The rows that nothing writes were the same in the two runs of the float module by chance.
                        return False
                layer = first_layer(quantized, guarded, call)
                where = f"; the first layer whose result differs is {layer}" if layer else ""
                raise NotCaptured(
                    f"in a call after another one the captured graph computes something else: {detail}{where}"
                )
    return True


def _results(
    quantized: QuantizedModule,
    calls: list[Inputs],
    forwards: list[Callable[..., Any]],
    gradients: bool,
    unkept: Iterable[str],
    at_least: int,
) -> list[Any]:
    """Return what each call in turn returns, and last what the tensors of the modules hold then.

    unkept: names of dicts that forward fills, and graphs do not. at_least: so many calls are made; further ones only
    while calls change the modules, as one of modules that are as they were was compared when they were captured.
    """
    owner = quantized.owner
    contents = Contents.of(owner)
    hints = {id(m.hint) for m in contents.modules if isinstance(m, FakeQuantizer)}
    found: list[Any] = []
    with preserved_tensors(owner, contents) as are_kept, preserved_attributes(owner, contents) as holds:
        for call, forward in zip(calls, forwards, strict=True):
            is_as_before = len(found) >= at_least and are_kept() and holds()
            if is_as_before and quantized.holding(*call, deeply=False) is not None:
                break
            args, kwargs = own_copy(call)
            result = run_keeping_state(owner, args, kwargs, forward, gradients=gradients)
            found.append(pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), result))
        for path, _, name in (cache.rpartition(".") for cache in unkept):
            getattr(owner.get_submodule(path), name).clear()
        return [*found, [t.detach().clone() for t in Contents.of(owner).state_tensors() if id(t) not in hints]]


def _variations(example: Inputs) -> Iterator[Inputs]:
    """Return calls of another batch and size, of another batch, of another size: about half, which takes less time."""
    tensors = [leaf for leaf in pytree.tree_leaves(tuple(example)) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not tensors:
        return
    batch = Counter(t.shape[0] for t in tensors).most_common(1)[0][0]
    lengths = Counter(t.shape[1] for t in tensors if t.dim() in (2, 3)).most_common(1)
    length = lengths[0][0] if lengths else 0

    def other(t: Tensor) -> Tensor:
        if t.dim() == 0 or t.shape[0] != batch:
            return t
        # Not one: sizes of one are broadcast, and batch norms cannot learn from one.
        return t[: batch // 2 + 1] if batch > 2 else torch.cat([t, t[:1]])

    def shorter(t: Tensor) -> Tensor:
        if t.dim() in (2, 3) and t.shape[1] == length > 1:
            return t[:, : length // 2 + 1 if length > 2 else 1]
        if t.dim() < 4:
            return t
        return t[(slice(None), slice(None), *(slice(_about_half(size)) for size in t.shape[2:]))]

    for change in (lambda t: shorter(other(t)), other, shorter):
        # Two that are one tensor stay so.
        yield Inputs(*pytree.tree_map_only(Tensor, functools.cache(change), tuple(example)))


def _about_half(size: int) -> int:
    return size - size // (2 * _PIXELS) * _PIXELS if size >= 2 * _PIXELS else (size + 1) // 2


def first_layer(module: QuantizedModule, guarded: GuardedGraph, call: Inputs) -> str | None:
    """Return the path of the first layer whose result is another one in the graph than in the float module."""
    expected: dict[str, Any] = {}

    def noted(path: str, _: Any, args: Any, result: Any) -> None:
        expected.setdefault(path, own_copy(result))

    named = [
        (path, m) for path, m in module.owner.named_modules() if path and not isinstance(m, torch.jit.ScriptModule)
    ]
    with permitted():
        handles = [m.register_forward_hook(functools.partial(noted, path)) for path, m in named]
    try:
        run_once(module.owner, *call, module.float_forward)
    finally:
        for handle in handles:
            handle.remove()
    recorder = _Recorder(module, guarded.graph)
    inputs = [call.kwargs.get(str(n.target), n.args[0] if n.args else None) for n in _placeholders(guarded.graph)]
    for position, value in enumerate(call.args):
        inputs[position] = value
    with without_quantizers(module.owner):
        run_once(module.owner, tuple(inputs), {}, recorder.run)
    for path, found in recorder.found.items():
        if path in expected and difference(expected[path], found) is not None:
            return path
    return None


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="placeholder"))


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the result of the first call at each site."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.found: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and keep what it returns."""
        result = super().run_node(n)
        path = str(n.target) if n.op == "call_module" else info(n).site
        if path is not None and isinstance(result, Tensor):
            self.found.setdefault(path, result.detach().clone())
        return result
