"""Capture by symbolic tracing with values: each proxy knows what the example inputs make of it.

Values are fake tensors (shapes and dtypes, no data), so sizes stay symbolic in the graph, while a branch on a size
takes the side that the example inputs take and leaves a check behind. That traces what plain fx.Tracer cannot:
attention with shape checks, loops over a list of features, functions hidden behind fx.wrap.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from octav_fx.capture.contents import attributes
from octav_fx.capture.guards import Guards
from octav_fx.capture.kinds import MISSING, kind_of, same_tensors
from octav_fx.capture.module_state import is_constant, own_copy
from octav_fx.capture.symbolic.guards import take_guards
from octav_fx.capture.symbolic.kept import nothing_kept
from octav_fx.capture.symbolic.names import symbolic_names
from octav_fx.capture.symbolic.patches import assigned_parameters, symbolic_torch, training_flags, unmoved_modules
from octav_fx.capture.symbolic.reads import Reads, watched_reads
from octav_fx.capture.symbolic.regions import regions
from octav_fx.capture.symbolic.side_effects import FLOAT_MODULE, is_cache, undone_writes
from octav_fx.capture.symbolic.tracer import ValueTracer
from octav_fx.capture.user_stack import user_line
from octav_fx.compat.tensors import pytree, quiet
from octav_fx.errors import NotCaptured, OctavError
from octav_fx.ir.dataflow import constants
from octav_fx.ir.meta import fake
from octav_fx.ir.ops import UserRules

_NOTHING: Final = UserRules()
_DEVICE: Final = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d+)?")


@dataclass(frozen=True, slots=True)
class Capture:
    """A traced graph. Its nodes carry what they compute for the arguments (meta.fake) and how much work that is."""

    graph: fx.Graph
    # Under what it holds.
    guards: Guards
    # Modules whose Python code branches on self.training: the graph holds for one mode only.
    depends_on_training: tuple[str, ...]
    # What the user has to know about this capture.
    notes: tuple[str, ...]
    # Attributes that forward, and the graph, set to tensors of the call.
    stored: tuple[str, ...]
    # Attributes that forward both reads and changes: a graph that should follow them must not change them again.
    remembered: tuple[str, ...]
    # Those of them that were None, not there or of another shape, as a guard asks, and are set to tensors of the call.
    begun: tuple[str, ...]
    # What code has something happen around a part of forward, which the graph does not, and what and where.
    around: Mapping[CodeType, str]
    # Modules with hooks of the user's, which the graph does not run.
    hooked: tuple[str, ...]
    # Dicts that forward fills and the graph does not, which computes in each call what would be in them.
    caches: tuple[str, ...]


def capture(
    root: nn.Module,
    arguments: Mapping[str, Any],
    user: UserRules = _NOTHING,
    numbers: frozenset[str] = frozenset(),
) -> Capture:
    """Trace root.forward for these arguments by name; root is in the mode to be captured.

    numbers: paths of plain numbers on its modules that the graph is to read in each call.
    Tensor constants that forward makes on the way become non-persistent buffers of root. Raises NotCaptured with
    the user's file and line where the Python code needs data to go on.
    """
    own = inspect.unwrap(type(root).forward)
    if inspect.isgeneratorfunction(own) or inspect.iscoroutinefunction(own):
        raise NotCaptured(
            f"forward of {type(root).__name__} is a generator or async, and computes nothing when it is called: let it "
            "return what it yields, in a list"
        )
    # Evaluation may write into objects among them.
    tracer = ValueTracer(own_copy(dict(arguments)), user=user, numbers=numbers)
    kinds, same = {name: kind_of(value) for name, value in arguments.items()}, same_tensors(*arguments.values())
    try:
        with (
            undone_writes(tracer, root),
            nothing_kept(root),
            training_flags(tracer, root),
            symbolic_torch(tracer),
            symbolic_names(root),
            # Before regions turn gradients on.
            watched_reads(tracer, root) as reads,
            assigned_parameters(tracer),
            unmoved_modules(tracer),
            regions(tracer),
            quiet(),
        ):
            for table in _tables_by_device(root):
                # The graph computes what is in it, so that it holds before and after a step.
                table.clear()
            graph = tracer.trace(root)
            if tracer.failed:
                raise NotCaptured(f"{tracer.failed[0]}: forward catches this error, and a graph cannot")
            # Looking at what forward stored may make nodes.
            with graph.inserting_before(next(iter(graph.find_nodes(op="output")))):
                remembered = reads.remembered()
            tracer.caches = _caches(graph, root, remembered, reads)
    except Exception as error:
        if isinstance(error, OctavError):
            raise NotCaptured(str(error)) from error
        raise NotCaptured(f"capture stopped at {user_line(error)}: {type(error).__name__}: {error}") from error
    for name, constant in tracer.made.items():
        if isinstance(constant, Tensor):
            root.register_buffer(name, constant, persistent=False)
        else:
            setattr(root, name, constant)
    modes = tuple(dict.fromkeys(tracer.branched_on))
    paths = {module: name for name, module in reversed(list(root.named_modules()))}
    named = {
        (module, name): f"{paths[module]}.{name}".lstrip(".")
        for module, name in remembered
        if module in paths and not is_constant(name) and (module, name) not in tracer.caches
    }
    begun = [
        key
        for key, name in named.items()
        if name in tracer.stored and reads.attributes[key] in (None, kind_of(MISSING))
    ]
    facts = [(path, kind_of(root.get_submodule(path.rpartition(".")[0]).training)) for path in modes]
    facts += [
        (f"{paths[module] or FLOAT_MODULE}.{name}", reads.numbers.get((module, name), kind))
        for (module, name), kind in reads.attributes.items()
        if module in paths and ((module, name) not in remembered or (module, name) in begun)
    ]
    guards = take_guards(graph, root, kinds, same, facts, reads)
    guards.hold_for(tuple(arguments.values()))
    _remove_unused(graph)
    for node in graph.nodes:
        # fx.wrap marks what its wrapper returned, which after inlining is any node; generated code would wrap that.
        node.meta.pop("is_wrapped", None)
    return Capture(
        graph,
        guards,
        modes,
        notes=tuple(tracer.notes),
        stored=tuple(tracer.stored),
        remembered=(*named.values(), *tracer.resized),
        begun=(*(named[key] for key in begun), *tracer.resized),
        around=tracer.around,
        hooked=tuple(tracer.hooked),
        caches=tuple(f"{paths[module]}.{name}".lstrip(".") for module, name in tracer.caches),
    )


def _caches(
    graph: fx.Graph, root: nn.Module, remembered: list[tuple[nn.Module, str]], reads: Reads
) -> set[tuple[nn.Module, str]]:
    """Return the remembered attributes that are dicts which forward fills with what state alone decides."""
    if not remembered:
        return set()
    # While it is traced a graph is no module's, whose layers could be asked what they write.
    graph.owning_module = root  # type: ignore[assignment]
    decided = constants(graph)
    graph.owning_module = None
    kinds = {(module, name): reads.attributes[module, name] for module, name in remembered}
    return {(m, name) for (m, name), kind in kinds.items() if is_cache(vars(m).get(name), kind, decided)}


def _tables_by_device(root: nn.Module) -> list[dict[Any, Any]]:
    """Return the dicts on modules that forward has filled with a tensor for each device, as LeViT does in eval mode."""
    held = (value for _, values in attributes(root) for value in values.values() if type(value) is dict and value)
    return [
        table
        for table in held
        if all(isinstance(key, torch.device) or (isinstance(key, str) and _DEVICE.fullmatch(key)) for key in table)
        and all(isinstance(value, Tensor) for value in table.values())
    ]


def _remove_unused(graph: fx.Graph) -> None:
    """Remove shape arithmetic and attributes that only a branch needed; what touches tensors could be in place."""
    for node in reversed(graph.nodes):
        if node.users or node.op in ("placeholder", "output", "call_module") or node.is_impure():
            continue
        if node.op == "get_attr" or not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(fake(node))):
            graph.erase_node(node)
