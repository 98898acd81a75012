"""What holds for a graph between two passes, as a table. The pipeline asks it where OCTAV_FX_VERIFY=1, as the tests do.

A pass that breaks an invariant is a bug of ours, never of a model: the error names the pass, the invariant, the node.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import torch
from torch import fx

import octav_fx.ops  # noqa: F401  registers torch.ops.octav
from octav_fx.formats.spec import spec_of
from octav_fx.ir.calls import Arguments, arguments_of
from octav_fx.ir.edits import Edit
from octav_fx.ir.joint import VIEWS, backward_of, closure, is_pointwise, origin
from octav_fx.ir.meta import fake, has_fake
from octav_fx.ir.ops import module_of
from octav_fx.ir.records import records
from octav_fx.nn import FakeQuantizer, Settings
from octav_fx.nn.fake_quantizer import QUANTIZERS

octav = torch.ops.octav


class InvariantError(AssertionError):
    """A pass left a graph in which something does not hold that all passes rely on."""


class Dialect(Enum):
    """Which kind of graph it is; the value is the key under which its nodes have their fake values."""

    # As capture leaves it: torch functions, methods and modules, quantizers as modules.
    CAPTURED = "value"
    # Of forward and backward, or of inference: aten ops, quantizers as octav ops.
    JOINT = "val"


@dataclass(frozen=True, slots=True)
class State:
    """A graph between two passes, and what the run has done so far."""

    gm: fx.GraphModule
    edits: Sequence[Edit]
    passes: Sequence[str]

    def calls(self, *targets: Any) -> Iterator[fx.Node]:
        """Yield the calls of these ops."""
        for target in targets:
            yield from self.gm.graph.find_nodes(op="call_function", target=target)


# A node, or its name, and what is wrong with it.
Fault = tuple[fx.Node | str, str]


@dataclass(frozen=True, slots=True)
class Invariant:
    """Something that holds for every graph of a dialect, from the passes on that bring it about."""

    name: str
    dialect: Dialect
    faults: Callable[[State], Iterator[Fault]]
    # Passes of the same run that have to be done; none: it holds from the start.
    after: tuple[str, ...] = ()


def is_wanted() -> bool:
    """Return whether the environment asks for it: OCTAV_FX_VERIFY=1."""
    return os.environ.get("OCTAV_FX_VERIFY") == "1"


def verify(gm: fx.GraphModule, edits: Sequence[Edit] = (), passes: Sequence[str] = ()) -> None:
    """Raise InvariantError, which names each node, if an invariant does not hold after these passes and their edits.

    Graphs without fake values (those of converted models) have no invariants yet.
    """
    dialect, state = dialect_of(gm.graph), State(gm, edits, passes)
    for invariant in INVARIANTS:
        if invariant.dialect is dialect and set(invariant.after) <= set(passes):
            found = [f"{node}: {what}" for node, what in invariant.faults(state)]
            if found:
                raise InvariantError(f"invariant {invariant.name!r} does not hold: {'; '.join(found)}")


def dialect_of(graph: fx.Graph) -> Dialect | None:
    """Return which kind of graph it is by what its nodes know of their values; None where they know nothing."""
    return next((dialect for node in graph.nodes for dialect in Dialect if dialect.value in node.meta), None)


def _fake_values(state: State) -> Iterator[Fault]:
    key = Dialect.JOINT.value
    for node in state.gm.graph.nodes:
        # Assertions return nothing.
        if node.op in ("placeholder", "call_function") and node.users and key not in node.meta:
            yield node, f"its fake value is not in meta[{key!r}]"


def _captured_values(state: State) -> Iterator[Fault]:
    for node in state.gm.graph.nodes:
        # Switches of modes return nothing; a region's body is a graph, and no value.
        is_body = node.op == "get_attr" and isinstance(getattr(state.gm, str(node.target), None), fx.GraphModule)
        if node.users and not is_body and not _is_quantizer(node) and not has_fake(node):
            yield node, "it has no fake value"


def _is_quantizer(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith(f"{QUANTIZERS}.")


def _one_input(state: State) -> Iterator[Fault]:
    for node in filter(_is_quantizer, state.gm.graph.nodes):
        inputs = [*node.args, *node.kwargs.values()]
        if len(inputs) != 1 or not isinstance(inputs[0], fx.Node):
            yield node, f"takes {len(inputs)} arguments, a quantizer takes one value"
        quantizer = module_of(node)
        if isinstance(quantizer, FakeQuantizer) and not isinstance(quantizer.settings, Settings):
            yield node, f"its spec is {quantizer.settings!r}"
        if not node.users:
            yield node, "nobody reads it"


def _operands(state: State) -> Iterator[Fault]:
    for record in records(state.gm.graph, state.edits):
        if record.operand is not None and record.quantizer is None and record.reason in (None, "no rule"):
            yield record.site, f"{record.operand} has no quantizer, and no edit says why"


def _codes(state: State) -> Iterator[Fault]:
    for node in state.calls(octav.dequantize.default):
        levels = arguments_of(node)
        if levels.codes.target is octav.quantize.default:
            codes = arguments_of(levels.codes)
            for name in ("clip", "spec"):
                if codes[name] != levels[name] and not (name == "clip" and _is_of_step_one(levels)):
                    yield node, f"{name} is {levels[name]}, that of its codes {codes[name]}"
    for node in state.calls(octav.quantize.default):
        call = arguments_of(node)
        dtype = spec_of(call.spec).format.codes_dtype
        if fake(node).dtype is not dtype:
            yield node, f"its codes are {node.meta['val'].dtype}, not {dtype}"


def _is_of_step_one(levels: Arguments) -> bool:
    """Return whether levels are the codes themselves, as a product of codes reads them."""
    plain = spec_of(levels.spec).plain
    if plain is None or levels.clip.target is not torch.ops.aten.full.default:
        return False
    return bool(arguments_of(levels.clip).fill_value == plain[0].steps)


def _granularity(state: State) -> Iterator[Fault]:
    targets = (octav.fake_quantize, octav.quantize, octav.dequantize, octav.fake_quantize_backward)
    for node in state.calls(*(target.default for target in targets)):
        call = arguments_of(node)
        spec, found = spec_of(call.spec), fake(call.clip).dim()
        axes = len(spec.clip_shape(fake(node).shape))
        if axes != found:
            yield node, f"its clip has {found} axes for {spec}"


def _split(state: State) -> Iterator[Fault]:
    for node in state.calls(octav.dynamic_fake_quantize.default):
        yield node, "is not split"


def _read(state: State) -> Iterator[Fault]:
    for node in state.gm.graph.nodes:
        if getattr(node.target, "namespace", None) == "octav" and not node.users:
            yield node, "nobody reads it"


_LEVELS: Final = tuple(op.default for op in (octav.fake_quantize, octav.dequantize, octav.fake_quantize_filters))


def _is_recomputed(node: fx.Node) -> bool:
    """Return whether save_codes tagged it: regions that users checkpoint have ids from 1 on."""
    return "recompute" in node.meta and node.meta.get("ac_graph_id") == 0


def _recomputed(state: State) -> Iterator[Fault]:
    for node in filter(_is_recomputed, state.gm.graph.nodes):
        if origin(node, VIEWS).target not in _LEVELS and not is_pointwise(node):
            yield node, "is recomputed, but neither levels nor pointwise"


def _no_float_copy(state: State) -> Iterator[Fault]:
    backward = backward_of(state.gm.graph)
    for levels in state.calls(*_LEVELS):
        for view in closure(levels, VIEWS):
            if view not in backward and backward.intersection(view.users) and not _is_recomputed(view):
                yield view, "backward reads levels that are not recomputed there"


INVARIANTS: Final = (
    # Passes decide by shapes and dtypes, of what other passes made, too.
    # Those of convert, which follow on a model whose values are gone, need none.
    Invariant("nodes have fake values", Dialect.CAPTURED, _captured_values, ("canonicalize",)),
    Invariant("nodes have fake values", Dialect.JOINT, _fake_values),
    # Tables, freezing and export take a quantizer for a function of one value.
    Invariant("a quantizer has one input, a Settings and a reader", Dialect.CAPTURED, _one_input),
    # Nothing stays float silently.
    Invariant(
        "operands have a quantizer or a reason", Dialect.CAPTURED, _operands, ("canonicalize", "quantize_operands")
    ),
    # Else codes would mean other levels than they were made for.
    Invariant("codes have one clip and one grid", Dialect.JOINT, _codes),
    Invariant("a clip is as fine as its quantizer", Dialect.JOINT, _granularity),
    Invariant("no quantizer is one node", Dialect.JOINT, _split, ("split_quantizers",)),
    # A solve that nobody reads costs as much as one that somebody does.
    Invariant("what quantizers compute is read", Dialect.JOINT, _read, ("split_quantizers",)),
    # The partitioner obeys tags blindly: of anything else, a whole layer would be computed twice.
    # In the halves that it leaves the tags have had their say.
    Invariant("only levels and what is pointwise are recomputed", Dialect.JOINT, _recomputed, ("split_quantizers",)),
    Invariant("backward keeps no float copy", Dialect.JOINT, _no_float_copy, ("split_quantizers", "save_codes")),
)
