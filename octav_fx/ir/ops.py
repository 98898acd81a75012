"""Which op a node is, whatever it was spelled as. Rules, analyses and tables speak in the names of ops only.

fx writes nn.Conv2d as a module, Dynamo as torch.conv2d, torch.export as aten: a row lists the spellings of one op.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import fx, nn

from octav_fx.compat.modules import children_of, conv_forward_of, has_own_forward
from octav_fx.compat.tensors import OpOverload, packet_of
from octav_fx.errors import OctavError
from octav_fx.ir.meta import info
from octav_fx.ir.op import Op
from octav_fx.ir.table.contractions import CONTRACTIONS
from octav_fx.ir.table.layers import ACTIVATION_FUNCTIONS, ARITHMETIC, BATCH_NORM, POOLS
from octav_fx.ir.table.movement import MOVEMENT


def by_name(ops: Iterable[Op]) -> dict[str, Op]:
    """Return the rows by name. Raises OctavError for a name or a spelling that two of them have."""
    named: dict[str, Op] = {}
    owners: dict[Any, Op] = {}
    for op in ops:
        if op.name in named:
            raise OctavError(f"op {op.name!r} has two rows in octav_fx/ir/table")
        if op.target is None:
            raise OctavError(f"the row of {op.name!r} has no target, the function that a canonical graph calls")
        named[op.name] = op
        for spelling in (op.target, *op.functions, *op.methods, *op.modules):
            if owners.setdefault(spelling, op) is not op:
                raise OctavError(f"{spelling!r} is a spelling of {owners[spelling].name!r} and of {op.name!r}")
    return named


OPS: Final[Mapping[str, Op]] = by_name(
    (*CONTRACTIONS, BATCH_NORM, *ACTIVATION_FUNCTIONS, *ARITHMETIC, *POOLS, *MOVEMENT)
)

_FUNCTIONS: Final = {spelling: op for op in OPS.values() for spelling in (op.target, *op.functions)}
# torch.ops.aten.mm, without .default, calls the overload that fits.
_FUNCTIONS.update({packet_of(f): op for f, op in list(_FUNCTIONS.items()) if isinstance(f, OpOverload)})
_METHODS: Final = {spelling: op for op in OPS.values() for spelling in op.methods}
_MODULES: Final = {spelling: op for op in OPS.values() for spelling in op.modules}


@dataclass(frozen=True, slots=True)
class UserRules:
    """What a user adds for one model: rows for functions, and classes of modules to leave as they are."""

    ops: tuple[Op, ...] = ()
    leaves: tuple[type[nn.Module], ...] = ()
    # Whether recurrent layers are written as linear steps.
    unrolls: bool = False


def op_of(node: fx.Node) -> Op | None:
    """Return the op a node is a spelling of, a user's own among them, or None for what no row knows."""
    if (own := info(node).op) is not None:
        return own
    match node.op:
        case "call_function":
            return _FUNCTIONS.get(node.target)
        case "call_method":
            return _METHODS.get(str(node.target))
        case "call_module":
            return op_of_module(module_of(node))
    return None


def is_op(node: fx.Node, *names: str) -> bool:
    """Tell whether a node is a spelling of one of some ops."""
    op = op_of(node)
    return op is not None and op.name in names


def is_altered(module: nn.Module) -> bool:
    """Tell whether forward, or what the forward of a convolution calls, is not that of torch's class."""
    if has_own_forward(module):
        return True
    torch_class = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("torch."))
    return conv_forward_of(type(module)) is not conv_forward_of(torch_class)


def op_of_module(module: nn.Module) -> Op | None:
    """Return the op a module computes. A subclass counts while it keeps its parent's forward."""
    if is_altered(module):
        return None
    for cls in type(module).__mro__:
        if cls in _MODULES:
            return _MODULES[cls] if type(module).forward is cls.forward else None
    return None


def module_of(node: fx.Node) -> nn.Module:
    """Return the module that a call_module node calls."""
    owner = node.graph.owning_module
    assert owner is not None, "the graph belongs to no GraphModule"
    module: Any = owner
    # Not by get_submodule: what looks attributes up takes many times as long.
    for name in str(node.target).split("."):
        module = children_of(module)[name]
    return module


def in_place(node: fx.Node) -> bool:
    """Return whether a node writes into one of its inputs."""
    match node.op:
        case "call_module":
            return bool(getattr(module_of(node), "inplace", False))
        case "call_method":
            return str(node.target).endswith("_") and not str(node.target).endswith("__")
        case "call_function":
            # An overload of torch.ops is named with its packet: add_.Tensor.
            name = getattr(node.target, "__name__", "").partition(".")[0]
            if getattr(node.target, "__module__", "") == "_operator":
                # Others end in an underscore because they would be keywords: and_, or_, not_, is_.
                return name in _AUGMENTED
            named = name.endswith("_") and not name.endswith("__")
            return named or bool(node.kwargs.get("inplace", False)) or node.kwargs.get("out") is not None
    return False


_AUGMENTED: Final = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem"}
)
