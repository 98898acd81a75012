"""fx graphs, the graphs of Dynamo, and the calls that regions of autocast make."""

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import fx
from torch.amp import autocast_mode
from torch.fx.graph_module import _forward_from_src

# What entering and leaving torch.autocast is in a graph.
ENTER_AUTOCAST: Final = autocast_mode._enter_autocast
EXIT_AUTOCAST: Final = autocast_mode._exit_autocast

# Calls an op that changes its arguments as a function, whose results are that of the op and the changed arguments.
auto_functionalized: Final = torch.ops.higher_order.auto_functionalized

# Torch's fused encoder layer of inference, one node in a graph.
FUSED_ENCODER_LAYER: Final = torch._transformer_encoder_layer_fwd


def set_exporting(value: bool) -> bool:
    """Let torch.compiler.is_exporting() and is_compiling() return a value; return the one of before."""
    before = torch.compiler._is_exporting_flag
    torch.compiler._is_exporting_flag = torch.compiler._is_compiling_flag = value
    return before


def autocast_settings(region: torch.autocast) -> tuple[Any, ...]:
    """Return the arguments of ENTER_AUTOCAST for a region: device, dtype, whether it is on, whether it caches."""
    return region.device, region.fast_dtype, region._enabled, region._cache_enabled


# By code, whose names may stand for other objects elsewhere.
_FUNCTIONS: Final = weakref.WeakValueDictionary[Any, Callable[..., Any]]()


def function_of(graph: fx.Graph) -> Callable[..., Any]:
    """Return a graph as a function of a module, whose state it reads, and its inputs: the same one for the same code.

    Compilers ask for functions: equal modules are compiled once.
    """
    code = graph.python_code("self")
    objects = tuple(sorted((name, id(value)) for name, value in code.globals.items()))
    function: Callable[..., Any] = _forward_from_src(code.src, dict(code.globals))
    return _FUNCTIONS.setdefault((code.src, objects), function)


def forward_from(source: str, names: dict[str, Any]) -> Callable[..., Any]:
    """Return the function `forward` of generated code, with source lines for tracebacks."""
    return _forward_from_src(source, dict(names))


def call_of_class(kind: Any) -> dict[str, Any]:
    """Return by name what a subclass of the class of a GraphModule has to have, to be called as that one is.

    It would get one of its own where code is generated, which calls the one above, which calls that of the object.
    """
    return {"_wrapped_call": kind._wrapped_call}


def compare_classes_by_value() -> None:
    """Let Dynamo find classes in dicts and sets by ==, as Python does; it looks for the very class."""
    kind = getattr(sys.modules.get("torch._dynamo.variables"), "UserDefinedClassVariable", None)
    if kind is None or kind in _BY_VALUE or not hasattr(kind, "is_python_equal"):
        return
    by_identity = kind.is_python_equal

    def is_equal(self: Any, other: Any) -> bool:
        return bool(by_identity(self, other) or (isinstance(other, kind) and self.value == other.value))

    kind.is_python_equal = is_equal
    _BY_VALUE.add(kind)


# What compare_classes_by_value() has changed.
_BY_VALUE: Final = set[type]()


def set_graph_without_code(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Give a GraphModule another graph; its code is the former one's until recompile() is called."""
    module._graph = graph
    graph.owning_module = module


@contextmanager
def replaced_graph(module: fx.GraphModule, graph: fx.Graph) -> Iterator[None]:
    """Let a GraphModule have another graph inside, without code of its own."""
    before = module._graph
    set_graph_without_code(module, graph)
    module.__dict__["recompile"] = lambda: None
    try:
        yield
    finally:
        module._graph = before
        del module.__dict__["recompile"]


def root_of(graph: fx.Graph) -> fx.Node:
    """Return the node before the first and after the last one."""
    return graph._root


def copy_dynamo_names(source: fx.GraphModule, target: fx.GraphModule) -> None:
    """Copy what AOTAutograd asks of a graph from Dynamo: the source of each parameter."""
    if hasattr(source, "_param_name_to_source"):
        target._param_name_to_source = source._param_name_to_source


def copy_dynamo_source(source: fx.Node, target: fx.Node) -> None:
    """Copy where in the user's objects the value of a placeholder comes from, if Dynamo said so."""
    if hasattr(source, "_dynamo_source"):
        target._dynamo_source = source._dynamo_source


def dynamo_source(node: fx.Node) -> str:
    """Return where the value of a placeholder comes from, L['self']._modules['fc']._parameters['weight']; or ""."""
    return str(getattr(getattr(node, "_dynamo_source", None), "name", ""))


def without_dynamo_source(node: fx.Node) -> None:
    """Mark a placeholder as one that nothing in the user's code leads to, so that Dynamo guards nothing."""
    node._dynamo_source = None


def locals_of_traced_frame() -> list[Any]:
    """Return the local variables of the function that Dynamo is compiling."""
    # Dynamo takes seconds to import, and is there when this is asked.
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return list(InstructionTranslator.current_tx().output.root_tx.f_locals.values())


@contextmanager
def replaced_while_loop(function: Callable[..., Any]) -> Iterator[None]:
    """Let a function of cond_fn, body_fn and the carried inputs run for torch's while_loop inside, however imported."""
    file = sys.modules.get("torch._higher_order_ops.while_loop")
    if file is None:
        yield
        return
    original: Any = file.while_loop

    def replaced(cond_fn: Any, body_fn: Any, carried_inputs: Any) -> Any:
        return octav_while_loop(cond_fn, body_fn, carried_inputs)  # type: ignore[name-defined]  # noqa: F821

    code = original.__code__
    names = original.__globals__
    names["octav_while_loop"], original.__code__ = function, replaced.__code__
    try:
        yield
    finally:
        original.__code__ = code
        del names["octav_while_loop"]


def forget_compiled_callers() -> None:
    """Have Dynamo compile the functions anew, at their next call, whose compiled code is running now."""
    from torch._C._dynamo.eval_frame import reset_code
    from torch._dynamo.utils import orig_code_map

    frame = inspect.currentframe()
    while frame is not None:
        if (original := orig_code_map.get(frame.f_code)) is not None:
            reset_code(original)
        frame = frame.f_back


def inductor_decompositions() -> dict[Any, Any]:
    """Return what Inductor wants to see composed of smaller ops, by op."""
    # Inductor takes seconds to import, and is there when this is asked.
    from torch._inductor.decomposition import select_decomp_table

    return dict(select_decomp_table())


def size_hint(size: int | torch.SymInt) -> int:
    """Return the size of a tensor for the example inputs, where free without a guard; 0 where it depends on data."""
    hint = size if isinstance(size, int) else size.node.hint
    return 0 if hint is None else int(hint)


def is_max_pool(node: fx.Node) -> bool:
    """Return whether a node of a joint graph returns the largest of each window, and where they are."""
    pools = ("prims._low_memory_max_pool_with_offsets.default", "aten.max_pool2d_with_indices.default")
    return str(node.target) in pools


def is_indices_of_pool(node: fx.Node) -> bool:
    """Return whether a node makes indices out of the small offsets that Inductor has a max pool keep."""
    return str(node.target) == "prims._low_memory_max_pool_offsets_to_indices.default"


@torch.compiler.assume_constant_result
def is_writing_onnx() -> bool:
    """Tell whether torch.onnx.export is tracing; torch's own function says no where Dynamo traces for it."""
    return torch.onnx.is_in_onnx_export()
