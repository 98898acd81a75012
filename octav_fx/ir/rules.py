"""Which inputs of which op are quantized. A rule says where; a Config says how finely."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from torch import fx, nn

from octav_fx.errors import OctavError
from octav_fx.ir.ops import CONTRACTIONS, op_of


class Role(Enum):
    """What an operand is, which decides its bits and its gradient."""

    ACTIVATION = "activation"
    WEIGHT = "weight"
    # A weight where it is computed from parameters alone, else an activation.
    EITHER = "either"


@dataclass(frozen=True, slots=True)
class Operand:
    """One quantized input: its position in node.args of the canonical op, and its names as a keyword."""

    index: int
    name: str
    role: Role
    # The axis with one clip for each index (weights only); None: one clip for the tensor.
    channel: int | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """The quantized operands of one op. No entry, no quantizer: a bias or a mask stays as it is."""

    op: str
    operands: tuple[Operand, ...]
    # All positional arguments from the last operand's index on are operands like it (einsum).
    variadic: bool = False
    # Of a user's own op: the function, or the op of torch.ops, whose calls the rule speaks of.
    target: Callable[..., Any] | None = None


@dataclass(frozen=True, slots=True)
class Own:
    """What a user adds for one model: rules for functions, and classes of modules to leave as they are."""

    rules: tuple[Rule, ...] = ()
    leaves: tuple[type[nn.Module], ...] = ()


# On a node: the rule of the user's that it falls under.
OWN: Final = "rule"
# Or that it calls a module which the user wants left as it is.
LEAF: Final = "leaf"


def rule_of(node: fx.Node) -> Rule | None:
    """The rule for a node: one of the user's, or that of its op."""
    op = op_of(node)
    return node.meta.get(OWN) or (RULES.get(op.name) if op is not None else None)


def activation(index: int, name: str, *aliases: str) -> Operand:
    """An operand that is data: one clip for the tensor."""
    return Operand(index, name, Role.ACTIVATION, None, aliases)


def weight(index: int, name: str, channel: int) -> Operand:
    """An operand that is a parameter: one clip for each index of its channel axis."""
    return Operand(index, name, Role.WEIGHT, channel)


def either(index: int, name: str, channel: int | None, *aliases: str) -> Operand:
    """An operand that is a weight if it is computed from parameters alone."""
    return Operand(index, name, Role.EITHER, channel, aliases)


def table(*rules: Rule) -> dict[str, Rule]:
    """The rules by op. Raises OctavError for an op twice, or for one that ops.py does not know."""
    known = {op.name for op in CONTRACTIONS}
    by_op: dict[str, Rule] = {}
    for rule in rules:
        if rule.op in by_op or rule.op not in known:
            raise OctavError(
                f"rule for {rule.op!r}: {'a second one' if rule.op in by_op else 'no such op in ir/ops.py'}"
            )
        by_op[rule.op] = rule
    return by_op


RULES: Final = table(
    Rule("conv1d", (activation(0, "input"), weight(1, "weight", channel=0))),
    Rule("conv2d", (activation(0, "input"), weight(1, "weight", channel=0))),
    Rule("conv3d", (activation(0, "input"), weight(1, "weight", channel=0))),
    # [in, out / groups, ...]: with groups, channel j of every group shares a clip.
    Rule("conv_transpose1d", (activation(0, "input"), weight(1, "weight", channel=1))),
    Rule("conv_transpose2d", (activation(0, "input"), weight(1, "weight", channel=1))),
    Rule("conv_transpose3d", (activation(0, "input"), weight(1, "weight", channel=1))),
    Rule("linear", (activation(0, "input"), weight(1, "weight", channel=0))),
    Rule("matmul", (either(0, "input", -2, "self"), either(1, "other", -1, "mat2", "vec", "tensor"))),
    Rule("addmm", (either(1, "mat1", -2), either(2, "mat2", -1))),
    Rule("addmv", (either(1, "mat", -2), either(2, "vec", None))),
    Rule("addbmm", (either(1, "batch1", -2), either(2, "batch2", -1))),
    Rule("baddbmm", (either(1, "batch1", -2), either(2, "batch2", -1))),
    # [rows, in] sorted by expert times [experts, in, out]: channel j of every expert shares a clip.
    Rule("grouped_mm", (either(0, "mat_a", -2, "self", "input"), either(1, "mat_b", -1, "mat2"))),
    # The equation names no output-channel axis that every operand has.
    Rule("einsum", (either(1, "operand", None),), variadic=True),
    # The softmax output inside of a fused attention stays float; the mask is not an operand.
    Rule("attention", (activation(0, "query"), activation(1, "key"), activation(2, "value"))),
)
