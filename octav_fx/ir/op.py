"""Op: all that is known of one op, in one row. The rows are in octav_fx/ir/table; a user's Rule is a row, too."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, Final

from torch import nn

from octav_fx.errors import OctavError
from octav_fx.ir.signs import SignRule

# Stands for the default of a parameter that has none.
REQUIRED: Final[Any] = ...


class Role(Enum):
    """What an operand is, which decides its bits and its gradient."""

    ACTIVATION = "activation"
    WEIGHT = "weight"
    # A weight where it is computed from parameters alone, else an activation.
    EITHER = "either"


class Trait(Enum):
    """What passes ask of an op."""

    # The result may share memory with the first input.
    VIEW = "view"
    # Two calls with the same inputs may differ.
    RANDOM = "random"
    # An element of the result depends on the elements of the inputs at its place alone.
    POINTWISE = "pointwise"
    # Keeps more bits where no contraction feeds it, and where it feeds none (arXiv 2206.06501, appendix E).
    FIRST_LAYER = "first layer"
    LAST_LAYER = "last layer"
    # The result is [N, C, *spatial], so that a batch norm of it can be folded into the weight.
    FEEDS_NORM = "feeds norm"
    # The weight is [in, out / groups, ...].
    TRANSPOSED = "transposed"


@dataclass(frozen=True, slots=True)
class Operand:
    """One quantized input of a contraction: its position among the parameters, and its names as a keyword."""

    index: int
    name: str
    role: Role
    # The axis with one clip for each index (weights only); None: one clip for the tensor.
    channel: int | None = None
    aliases: tuple[str, ...] = ()
    # The axis that the products are summed over; None: see reduction_axis.
    reduction: int | None = None
    # Which of the tensors of a list, where the parameter is one; None: the parameter is the operand.
    part: int | None = None

    def reduction_axis(self, dims: int) -> int | None:
        """Return the axis, counted from the front, that the products of a tensor with so many axes are summed over.

        By default the only axis, or of two the one beside the channel axis; None if neither rule decides.
        """
        if dims == 1:
            return 0
        if self.reduction is not None:
            return self.reduction % dims
        return 1 - self.channel % dims if dims == 2 and self.channel is not None else None


def activation(index: int, name: str, *aliases: str, reduction: int | None = None) -> Operand:
    """Return an operand that is data: one clip for the tensor."""
    return Operand(index, name, Role.ACTIVATION, None, aliases, reduction)


def weight(index: int, name: str, channel: int, reduction: int | None = None) -> Operand:
    """Return an operand that is a parameter: one clip for each index of its channel axis."""
    return Operand(index, name, Role.WEIGHT, channel, (), reduction)


def either(index: int, name: str, channel: int | None, *aliases: str, reduction: int | None = None) -> Operand:
    """Return an operand that is a weight if it is computed from parameters alone."""
    return Operand(index, name, Role.EITHER, channel, aliases, reduction)


def parameters(*required: str, **defaults: Any) -> Mapping[str, Any]:
    """Return the parameters of a function in their order, with their defaults."""
    return {**dict.fromkeys(required, REQUIRED), **defaults}


# Makes a call of a function before the module's own, as conv does for a padding that is not zeros.
MakeCall = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Op:
    """One op: its names, which of its inputs are quantized, and what passes have to know of it.

    An input without an Operand gets no quantizer: a bias or a mask stays as it is. Raises OctavError for operands that
    contradict each other or the parameters.
    """

    name: str
    operands: tuple[Operand, ...] = ()
    # All positional arguments from the last operand's index on are operands like it (einsum).
    variadic: bool = False
    # The spelling of a canonical graph. Of a user's own op: the function, or the op of torch.ops, that is quantized.
    target: Callable[..., Any] | None = None
    _: KW_ONLY
    # Every other spelling.
    functions: tuple[Any, ...] = ()
    methods: tuple[str, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()
    # The parameters of target in order, with their defaults. By default the operands, or one input.
    parameters: Mapping[str, Any] = field(default_factory=dict)
    # What other spellings call a parameter; operands have aliases of their own, and "self" is always the first.
    aliases: Mapping[str, str] = field(default_factory=dict)
    # call_of(module, make_call, *inputs) -> the arguments with which a module of this op calls target.
    call_of: Callable[..., tuple[Any, ...]] | None = None
    # When the result is never below zero; None: it may be.
    nonnegative: SignRule | None = None
    traits: frozenset[Trait] = frozenset()
    # How many axes of its input a convolution moves along.
    spatial: int = 0

    def __post_init__(self) -> None:
        if not self.parameters:
            named = {operand.index: operand.name for operand in self.operands} or {0: "input"}
            found = [named.get(i, f"argument{i}") for i in range(max(named) + 1)]
            object.__setattr__(self, "parameters", parameters(*found))
        for operand in () if self.variadic else self.operands:
            if operand.part is None and list(self.parameters)[operand.index : operand.index + 1] != [operand.name]:
                raise OctavError(f"op {self.name!r}: operand {operand.name!r} is not parameter {operand.index} of it")
        spellings = [name for operand in self.operands for name in (operand.name, *operand.aliases)]
        if len(set(spellings)) < len(spellings):
            raise OctavError(f"op {self.name!r}: two operands have one name among {', '.join(spellings)}")

    @cached_property
    def keywords(self) -> Mapping[str, str]:
        """Return every keyword that some spelling takes, with the name of its parameter."""
        named = {"self": next(iter(self.parameters)), **self.aliases}
        named |= {alias: operand.name for operand in self.operands for alias in operand.aliases}
        return named | {name: name for name in self.parameters}
