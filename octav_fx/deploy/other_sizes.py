"""Whether a file computes for other sizes of its free axes what the model computes: it is one graph, without guards."""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from octav_fx.capture.guards import DoesNotHold
from octav_fx.capture.inputs import Inputs, as_inputs, tensors_of
from octav_fx.capture.integer_module import IntegerModule
from octav_fx.capture.module_state import own_copy
from octav_fx.capture.symbolic.guards import guard_equal
from octav_fx.compat.graphs import function_of
from octav_fx.compat.programs import Program, exported
from octav_fx.compat.tensors import FakeTensorMode, pytree, quiet
from octav_fx.deploy.convert import rewritten
from octav_fx.deploy.translate import cause_of, free_call, has_axes, names_of
from octav_fx.errors import OctavError
from octav_fx.nn import StaticQuantizer
from octav_fx.passes import COMPUTE, CONVERT

# No guard is asked about more elements than so many, nor a model.
_LARGEST: Final = 2**22
# Of the largest result: graphs of other kinds of calls may sum in another order, and move codes at ties.
_ALIKE: Final = 1e-2


@dataclass(frozen=True)
class _Axes:
    """The free axes of the tensors among the inputs, in their order, and the size that these have in the example."""

    free: tuple[frozenset[int], ...]
    size: int


def check_other_sizes(
    q: nn.Module,
    converted: nn.Module,
    example_inputs: Any,
    dynamic_batch: bool,
    dynamic_axes: Mapping[str, Sequence[int]],
) -> None:
    """Raise OctavError where a frozen model computes for another size of free axes otherwise than its graph.

    converted: what is written, whose guards name the sizes; of those that break them the model itself is asked. Sizes
    that it refuses are no fault. Of a model of several graphs check_other_ways tells.
    """
    if not isinstance(converted, IntegerModule):
        return
    guards = converted.octav_guarded.guards
    sizes = None if guards is None else guards.sizes
    checks = _checks(converted)
    if sizes is None and checks is None:
        return
    call = as_inputs(example_inputs)
    # What most models do not need: no size breaks their guards.
    defined = functools.cache(lambda: rewritten(q, (*CONVERT, *COMPUTE)))

    def fault(given: Inputs) -> str | None:
        bound = _bound(converted, given)
        found = None if sizes is None else sizes.broken(converted, bound.args, bound.kwargs)
        return _fault_without_data(checks, converted, bound) if found is None and checks is not None else found

    def compute(given: Inputs) -> Any:
        # Forward may write into its state.
        module = copy.deepcopy(defined())
        assert isinstance(module, IntegerModule)
        bound = _bound(module, given)
        return module.octav_guarded.function()(module, *bound.args, **bound.kwargs)

    named = call.kwargs or dict(zip(names_of(converted, len(call.args)), call.args, strict=True))
    _ask(q, call, _groups(named, dynamic_batch, dynamic_axes), fault, compute)


def check_other_ways(
    q: nn.Module,
    written: nn.Module,
    example_inputs: Any,
    dynamic_batch: bool,
    dynamic_axes: Mapping[str, Sequence[int]],
) -> None:
    """Raise OctavError where Python around the graphs of a frozen model goes another way for other sizes.

    written: what the exporter has written of it, of which torch.export says what that Python asked of sizes.
    """
    if isinstance(written, IntegerModule) or not (dynamic_batch or dynamic_axes):
        return
    free = free_call(written, as_inputs(example_inputs), dynamic_batch=dynamic_batch, dynamic_axes=dynamic_axes)
    args, kwargs = free.args, free.kwargs
    try:
        asked = exported(written, args, kwargs, free.dynamic)
    except Exception as error:
        cause = str(cause_of(error)).strip().partition("\n")[0]
        warnings.warn(
            "export_onnx: whether Python around the graphs goes another way for other sizes could not be asked, "
            f"compare results of the file for other sizes with the model's: {cause}",
            stacklevel=2,
        )
        return

    @functools.cache
    def defined() -> Program:
        return exported(rewritten(q, (*CONVERT, *COMPUTE)), args, kwargs, free.dynamic)

    groups = _groups(free.named, dynamic_batch, dynamic_axes)
    # A guard that only one size breaks (!= 77) is met by chance otherwise.
    sizes = asked.numbers
    _ask(q, Inputs(args, kwargs), groups, lambda x: asked.broken(*x), lambda x: defined().run(*x), sizes)


def _ask(
    q: nn.Module,
    call: Inputs,
    groups: Iterable[_Axes],
    fault: Callable[[Inputs], str | None],
    compute: Callable[[Inputs], Any],
    sizes: Sequence[int] = (),
) -> None:
    """Ask the model about other sizes for which what is written does not hold, by fault.

    compute: what is written. sizes: further ones to ask of.
    """
    asked = list[str]()
    for axes in groups:
        for given, broken in _breaking(call, axes, fault, sizes):
            place = broken.partition(": ")[0]
            # A place may be one of several that the same size breaks.
            if asked.count(place) < 3:
                asked.append(place)
                _check(q, compute, given, place)


def _checks(converted: IntegerModule) -> Callable[..., Any] | None:
    """Return a function of the module and its arguments that asks what the graph does on its way; None: nothing.

    Quantizers are left out, of many ops each: what they return has the sizes of what they are given.
    """
    graph = fx.Graph()
    graph.graph_copy(converted.graph, {})
    for node in graph.find_nodes(op="call_module"):
        if isinstance(converted.get_submodule(str(node.target)), StaticQuantizer):
            node.replace_all_uses_with(node.all_input_nodes[0])
    for node in reversed(graph.nodes):
        if not node.users and node.op != "placeholder" and node.target is not guard_equal:
            graph.erase_node(node)
    if not graph.find_nodes(op="call_function", target=guard_equal):
        return None
    graph.output(())
    return function_of(graph)


def _fault_without_data(
    checks: Callable[..., Any], converted: IntegerModule, bound: inspect.BoundArguments
) -> str | None:
    """Say which size that a graph computes on its way is not what it was, or return None."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (bound.args, bound.kwargs))
    with torch.no_grad(), quiet(), mode:
        try:
            checks(converted, *args, **kwargs)
        except DoesNotHold as error:
            return str(error)
        except Exception as error:
            return f"the graph of the example fails: {error}"
    return None


def _check(q: nn.Module, compute: Callable[[Inputs], Any], given: Inputs, place: str) -> None:
    """Raise OctavError where a model runs for inputs and what is written, past its guards, is not the same."""
    # Forward may write into its state and arguments, and a call of a new kind makes a graph.
    q = copy.deepcopy(q).eval()
    with torch.no_grad(), warnings.catch_warnings():
        # Of quantizers that a new graph brings.
        warnings.simplefilter("ignore")
        try:
            args, kwargs = own_copy(tuple(given))
            expected = tensors_of(q(*args, **kwargs))
        except OctavError:
            expected = None
        except Exception:
            return
        try:
            found = tensors_of(compute(Inputs(*own_copy(tuple(given)))))
        except Exception:
            found = None
    if expected is None or found is None or not _are_alike(found, expected):
        sizes = ", ".join(str([*x.shape]) for x in tensors_of((given.args, given.kwargs)))
        raise OctavError(
            f"for inputs {sizes} the model computes another way than for the example ({place}), and a file has one "
            "way: export it for one size, with dynamic_batch=False where the number of inputs decides, else without "
            "dynamic_axes"
        )


def _are_alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    def close(f: Tensor, e: Tensor) -> bool:
        if f.shape != e.shape or f.dtype != e.dtype:
            return False
        if not f.is_floating_point():
            return torch.equal(f, e)
        return f.numel() == 0 or bool((f - e).abs().max() <= _ALIKE * e.abs().max())

    return len(found) == len(expected) and all(map(close, found, expected))


def _bound(module: IntegerModule, given: Inputs) -> inspect.BoundArguments:
    bound = inspect.signature(module.forward).bind(*given.args, **given.kwargs)
    bound.apply_defaults()
    return bound


def _groups(
    named: Mapping[str, Any], dynamic_batch: bool, dynamic_axes: Mapping[str, Sequence[int]]
) -> Iterator[_Axes]:
    """Yield the axes that are free together: those of the batch, and others that have one size in the example."""
    leaves = [(name, leaf) for name, value in named.items() for leaf in tensors_of(value)]
    batch = next((len(leaf) for _, leaf in leaves if leaf.dim()), None)
    if dynamic_batch and batch is not None:
        yield _Axes(tuple(frozenset([0] if x.dim() and len(x) == batch else []) for _, x in leaves), batch)
    # Of axes that are not there others tell.
    held = {name: axes for name, axes in dynamic_axes.items() if has_axes(named.get(name), axes)}
    others = [frozenset(axis % x.dim() for axis in held.get(name, ())) for name, x in leaves]
    for size in {x.shape[axis] for (_, x), axes in zip(leaves, others, strict=True) for axis in axes}:
        free = zip(leaves, others, strict=True)
        yield _Axes(tuple(frozenset(axis for axis in axes if x.shape[axis] == size) for (_, x), axes in free), size)


def _breaking(
    call: Inputs, axes: _Axes, fault: Callable[[Inputs], str | None], sizes: Sequence[int]
) -> Iterator[tuple[Inputs, str]]:
    """Yield inputs of other sizes for which the graph does not hold, and why: near ones, and the nearest larger one.

    sizes: further ones.
    """
    size = axes.size
    most = _LARGEST * size // max(x.numel() for x in tensors_of((call.args, call.kwargs)))

    def those_of(others: Iterable[int]) -> Iterator[tuple[Inputs, str]]:
        for other in others:
            if 0 < other != size and (why := fault(given := _resized(call, axes, other))) is not None:
                yield given, why

    yield from those_of((size + 1, size - 1, size + 2, 2 * size, 1))
    yield from those_of(_nearest_larger(call, axes, fault, most))
    yield from those_of(other for other in sizes if other <= most)


def _nearest_larger(call: Inputs, axes: _Axes, fault: Callable[[Inputs], str | None], most: int) -> list[int]:
    """Return the nearest larger size for which the graph does not hold, if large steps and halving find one."""

    def breaks(size: int) -> bool:
        return fault(_resized(call, axes, size)) is not None

    low, high = axes.size, 2 * axes.size
    while not breaks(high):
        # In few steps: each asks the whole graph.
        low, high = high, 8 * high
        if high > most:
            return []
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if breaks(middle) else (middle, high)
    return [high]


def _resized(call: Inputs, axes: _Axes, size: int) -> Inputs:
    """Return inputs with another size of some axes, of the elements that the example has there."""
    free = iter(axes.free)

    def resized(x: Tensor) -> Tensor:
        for axis in next(free):
            x = x.index_select(axis, torch.arange(size, device=x.device) % axes.size)
        return x

    return Inputs(*pytree.tree_map_only(Tensor, resized, (call.args, dict(call.kwargs))))
