"""signedness: what is claimed non-negative is, whatever the data; what the tables promise is found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from octav_fx.ir import signs
from octav_fx.ir.ops import OPS
from octav_fx.ir.signedness import nonnegative
from tests.support.graphs import captured, model

Forward = Callable[[nn.Module, Tensor], Any]


def claims(forward: Forward, *, data: Tensor, **parts: Any) -> tuple[set[str], bool]:
    """Names of the nodes that are claimed, and whether the result is; every claim is checked on data.

    Checked at the end of the run too: a value has to stay what it is claimed to be until its last reader is done.
    """
    gm = captured(model(forward, **parts), x=data)
    claimed = nonnegative(gm.graph)
    values: dict[fx.Node, Any] = {}

    class Watch(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            values[node] = super().run_node(node)
            check(node)
            return values[node]

    def check(node: fx.Node) -> None:
        for leaf in pytree.tree_leaves(values[node]) if node in claimed else ():
            if isinstance(leaf, Tensor) and not leaf.is_complex():
                assert not (leaf < 0).any(), f"{node.format_node()} is below zero"

    Watch(gm, garbage_collect_values=False).run(data)
    for node in values:
        check(node)
    (output,) = [node for node in gm.graph.nodes if node.op == "output"]
    return {node.name for node in claimed}, output.args[0] in claimed


# Row -> forward functions of a signed x; the result of each is non-negative.
ALWAYS_CASES: dict[str, list[Forward]] = {
    "relu": [lambda s, x: F.relu(x), lambda s, x: torch.relu(x), lambda s, x: x.relu_(), lambda s, x: nn.ReLU(True)(x)],
    "relu6": [lambda s, x: F.relu6(x), lambda s, x: s.relu6(x)],
    "sigmoid": [lambda s, x: torch.sigmoid(x), lambda s, x: x.sigmoid(), lambda s, x: torch.special.expit(x)],
    "hardsigmoid": [lambda s, x: F.hardsigmoid(x)],
    "softmax": [lambda s, x: F.softmax(x, 1), lambda s, x: x.softmax(-1), lambda s, x: torch.softmax(x, 0)],
    "softplus": [lambda s, x: F.softplus(x)],
    "abs": [lambda s, x: x.abs(), lambda s, x: abs(x), lambda s, x: torch.abs(x)],
    "exp": [lambda s, x: x.exp(), lambda s, x: torch.exp(x)],
    "square": [lambda s, x: x.square(), lambda s, x: torch.square(x)],
    # NaN for what has no root.
    "sqrt": [lambda s, x: x.sqrt(), lambda s, x: torch.sqrt(x)],
}
# Row -> forward functions that are given either the signed x [2, 4, 6, 6] or its relu.
PRESERVING_CASES: dict[str, list[Forward]] = {
    "max_pool": [lambda s, x: F.max_pool2d(x, 3, padding=1), lambda s, x: nn.MaxPool2d(2)(x)],
    "avg_pool": [lambda s, x: F.avg_pool2d(x, 2), lambda s, x: nn.AvgPool2d(2)(x)],
    "adaptive_avg_pool": [lambda s, x: F.adaptive_avg_pool2d(x, 2)],
    "adaptive_max_pool": [lambda s, x: F.adaptive_max_pool2d(x, 2)],
    "mean": [lambda s, x: x.mean((2, 3)), lambda s, x: torch.mean(x)],
    "sum": [lambda s, x: x.sum(1), lambda s, x: torch.sum(x)],
    "amax": [lambda s, x: x.amax(1), lambda s, x: torch.amax(x, 1)],
    "flatten": [lambda s, x: x.flatten(1), lambda s, x: torch.flatten(x), lambda s, x: nn.Flatten()(x)],
    "reshape": [lambda s, x: x.reshape(2, -1), lambda s, x: x.view(2, 4, 36), lambda s, x: x.unflatten(1, (2, 2))],
    "permute": [lambda s, x: x.permute(0, 2, 3, 1), lambda s, x: torch.permute(x, (1, 0, 2, 3))],
    "transpose": [lambda s, x: x.transpose(0, 1), lambda s, x: torch.swapaxes(x, 2, 3)],
    "movedim": [lambda s, x: x.movedim(1, -1)],
    "squeeze": [lambda s, x: x[:, :1].squeeze(1)],
    "unsqueeze": [lambda s, x: x.unsqueeze(0)],
    "expand": [lambda s, x: x[:, :1].expand(-1, 3, -1, -1)],
    "repeat": [lambda s, x: x.repeat(1, 2, 1, 1), lambda s, x: torch.repeat_interleave(x, 2, 1)],
    "contiguous": [lambda s, x: x.transpose(0, 1).contiguous(), lambda s, x: x.clone(), lambda s, x: x.detach()],
    "cast": [lambda s, x: x.to(torch.float64), lambda s, x: x.half(), lambda s, x: x.to(x.device)],
    "roll": [lambda s, x: x.roll(1, 2), lambda s, x: torch.flip(x, (3,))],
    "pixel_shuffle": [lambda s, x: F.pixel_shuffle(x, 2), lambda s, x: F.channel_shuffle(x, 2)],
    "chunk": [lambda s, x: x.chunk(2, 1)[1], lambda s, x: torch.split(x, 1, 1)[3], lambda s, x: x.unbind(1)[0]],
    "getitem": [lambda s, x: x[:, 1:3, ..., None], lambda s, x: x[0]],
    "dropout": [lambda s, x: F.dropout(x, 0.5, training=True), lambda s, x: F.dropout2d(x, 0.5, training=True)],
    "identity": [lambda s, x: torch.positive(x), lambda s, x: s.identity(x)],
}
# Row -> forward functions of two inputs: non-negative if both are.
COMBINING_CASES: dict[str, list[Callable[[Any, Any], Any]]] = {
    "add": [lambda x, y: x + y, torch.add, lambda x, y: x.add(y)],
    "mul": [lambda x, y: x * y, torch.mul, lambda x, y: x.mul(y)],
    "div": [lambda x, y: x / y, torch.div, lambda x, y: torch.div(x, y, rounding_mode="floor")],
    "cat": [lambda x, y: torch.cat((x, y), 1), lambda x, y: torch.stack([x, y])],
    "maximum": [torch.maximum],
}
# Row -> (forward, whether the result is claimed); x is signed.
SPECIAL_CASES: dict[str, list[tuple[Forward, bool]]] = {
    "clamp": [
        (lambda s, x: x.clamp(0, 1), True),
        (lambda s, x: x.clamp(min=0.5), True),
        (lambda s, x: torch.clip(x, 0), True),
        (lambda s, x: F.hardtanh(x, 0, 6), True),
        (lambda s, x: F.hardtanh(x, min_val=0.0), True),
        (lambda s, x: s.unit(x), True),
        (lambda s, x: x.relu().clamp(max=1), True),
        (lambda s, x: x.clamp(max=1), False),
        (lambda s, x: x.clamp(-1, 1), False),
        (lambda s, x: F.hardtanh(x), False),
        (lambda s, x: s.hardtanh(x), False),
    ],
    "pow": [
        (lambda s, x: x**2, True),
        (lambda s, x: x.pow(4), True),
        (lambda s, x: torch.pow(x, exponent=2), True),
        (lambda s, x: x.relu() ** 0.5, True),
        (lambda s, x: x.relu() ** 3, True),
        (lambda s, x: x**3, False),
        (lambda s, x: torch.pow(-2.0, x.relu().round()), False),
    ],
    "interpolate": [
        (lambda s, x: F.interpolate(x.relu(), scale_factor=2), True),
        (lambda s, x: F.interpolate(x.relu(), scale_factor=2, mode="bilinear"), True),
        (lambda s, x: F.interpolate(x.relu(), (3, 3), mode="bilinear", antialias=True), True),
        (lambda s, x: F.interpolate(x.relu(), (3, 3), mode="area"), True),
        (lambda s, x: s.nearest(x.relu()), True),
        (lambda s, x: F.interpolate(x, scale_factor=2), False),
        (lambda s, x: F.interpolate(x.relu(), scale_factor=2, mode="bicubic"), False),
        (lambda s, x: F.interpolate(x.relu(), (9, 9), None, "bicubic"), False),
        (lambda s, x: s.bicubic(x.relu()), False),
    ],
    "pad": [
        (lambda s, x: F.pad(x.relu(), (1, 1)), True),
        (lambda s, x: F.pad(x.relu(), (1, 1), value=2.0), True),
        (lambda s, x: F.pad(x.relu(), (1, 1, 1, 1), mode="reflect"), True),
        (lambda s, x: s.zero_pad(x.relu()), True),
        (lambda s, x: F.pad(x.relu(), (1, 1), value=-1.0), False),
        (lambda s, x: F.pad(x.relu(), (1, 1), "constant", -1), False),
        (lambda s, x: F.pad(x, (1, 1)), False),
    ],
}
MODULES = {
    "relu6": nn.ReLU6(),
    "identity": nn.Identity(),
    "unit": nn.Hardtanh(0.0, 1.0),
    "hardtanh": nn.Hardtanh(),
    "nearest": nn.Upsample(scale_factor=2),
    "bicubic": nn.Upsample(scale_factor=2, mode="bicubic"),
    "zero_pad": nn.ZeroPad2d(1),
}
SHAPE = (2, 4, 6, 6)


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(case, id=f"{row}-{i}") for row, listed in table.items() for i, case in enumerate(listed)]


def test_every_row_that_speaks_of_signs_has_a_case() -> None:
    def named(rule: signs.SignRule) -> set[str]:
        return {op.name for op in OPS.values() if op.nonnegative is rule}

    assert (set(ALWAYS_CASES), set(PRESERVING_CASES)) == (named(signs.always), named(signs.as_input))
    rest = {op.name for op in OPS.values() if op.nonnegative not in (None, signs.always, signs.as_input)}
    assert set(COMBINING_CASES) | set(SPECIAL_CASES) == rest


@pytest.mark.parametrize("forward", cases(ALWAYS_CASES))
def test_never_negative(forward: Forward) -> None:
    assert claims(forward, data=torch.randn(SHAPE), **MODULES)[1]


@pytest.mark.parametrize("forward", cases(PRESERVING_CASES))
def test_as_the_input(forward: Forward) -> None:
    assert claims(lambda self, x: forward(self, x.relu()), data=torch.randn(SHAPE), **MODULES)[1]
    assert not claims(forward, data=torch.randn(SHAPE), **MODULES)[1]


@pytest.mark.parametrize("combine", cases(COMBINING_CASES))
def test_as_all_of_the_inputs(combine: Callable[[Any, Any], Any]) -> None:
    x = torch.randn(SHAPE)
    assert claims(lambda self, x: combine(x.abs(), x.exp()), data=x)[1]
    assert not claims(lambda self, x: combine(x.abs(), x), data=x)[1]
    assert not claims(lambda self, x: combine(x, x.abs()), data=x)[1]
    assert not claims(lambda self, x: combine(x.abs(), self.buffer), data=x, buffer=torch.ones(SHAPE))[1]


@pytest.mark.parametrize("case", cases(SPECIAL_CASES))
def test_as_the_arguments_say(case: tuple[Forward, bool]) -> None:
    forward, expected = case
    assert claims(forward, data=torch.randn(SHAPE), **MODULES)[1] is expected


@pytest.mark.parametrize(
    "forward", [F.gelu, F.silu, F.hardswish, F.elu, F.leaky_relu, torch.tanh, torch.neg, torch.log]
)
def test_what_can_be_negative_is_not_claimed(forward: Callable[[Tensor], Tensor]) -> None:
    assert not claims(lambda self, x: forward(x.relu()), data=torch.randn(SHAPE))[1]


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: x.relu() - 0.1,
        lambda s, x: -x.relu(),
        lambda s, x: 1 - x.sigmoid(),
        lambda s, x: x.relu() * -1.0,
        lambda s, x: x.relu() + -0.5,
        lambda s, x: x.relu() / -2,
        lambda s, x: torch.stack((x.relu(), -x.relu())),
        # By name, too.
        lambda s, x: torch.add(x.relu(), other=x),
        lambda s, x: torch.add(x.relu(), x.abs(), alpha=-1),
        lambda s, x: torch.cat(tensors=(x.relu(), x), dim=1),
        lambda s, x: x.relu().amin(1) - x.relu().amax(1),
        lambda s, x: s.norm(x.relu()),
    ],
)
def test_arithmetic_below_zero_is_not_claimed(forward: Forward) -> None:
    assert not claims(forward, data=torch.randn(SHAPE), norm=nn.BatchNorm2d(4))[1]


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: x.relu() + 1,
        lambda s, x: 2 * x.relu(),
        lambda s, x: x.relu() / x.shape[0],
        lambda s, x: x * x,
        lambda s, x: torch.add(x.relu(), other=x.abs(), alpha=2),
        lambda s, x: torch.cat(tensors=(x.relu(), x.abs()), dim=1),
        # An axis is no value.
        lambda s, x: torch.cat((x.relu(), x.abs()), -1),
        lambda s, x: sum([x.relu(), x.abs()]),
        lambda s, x: (x.relu() + x.sigmoid()).flatten(1).mean(1),
    ],
)
def test_arithmetic_above_zero_is_claimed(forward: Forward) -> None:
    assert claims(forward, data=torch.randn(SHAPE))[1]


OVERWRITTEN: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda y: y.sub_(1),
    "a view": lambda y: y.view(-1)[3:].neg_(),
    "a transposed view": lambda y: y.transpose(0, 1).mul_(-1),
    "a chunk": lambda y: y.chunk(2, 1)[0].fill_(-1.0),
    "a function": lambda y: F.threshold(y, 100.0, -5.0, inplace=True),
    "a function, inplace by position": lambda y: F.hardtanh(y, -1.0, -0.5, True),
    "through an identity": lambda y: F.dropout(y, training=False).neg_(),
    "copied into": lambda y: y[0].copy_(y[0] - 1),
}


@pytest.mark.parametrize("name", OVERWRITTEN)
def test_a_value_that_is_overwritten_later_is_not_claimed(name: str) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = x.relu()
        OVERWRITTEN[name](y)
        return y

    assert not claims(forward, data=torch.randn(SHAPE))[1]


def test_an_overwrite_of_something_else_changes_nothing() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = x.relu()
        (y + 1).neg_()
        return y

    assert claims(forward, data=torch.randn(SHAPE))[1]


def test_what_an_in_place_op_returns_is_claimed() -> None:
    assert claims(lambda self, x: (x - 1).relu_().flatten(1), data=torch.randn(SHAPE))[1]


UNARY: tuple[Callable[[Tensor], Tensor], ...] = (
    *(torch.relu, torch.abs, torch.square, torch.sigmoid, torch.neg, torch.tanh, torch.exp),
    *(F.gelu, F.relu6, lambda y: y.clamp(0, 2), lambda y: y.clamp(max=2), lambda y: y**3, lambda y: y**2),
    *(lambda y: F.max_pool1d(y, 3, 1, 1), lambda y: F.avg_pool1d(y, 3, 1, 1), lambda y: F.pad(y[..., 1:], (1, 0))),
    *(lambda y: y.flip(-1), lambda y: y.softmax(-1), lambda y: y - 0.5, lambda y: y * -0.5, lambda y: y + 0.5),
    *(lambda y: y.mean(-1, keepdim=True).repeat(1, 1, 8), lambda y: F.interpolate(y, 8, mode="linear")),
    *(lambda y: y.roll(1, 1), lambda y: y.sub_(0.2), lambda y: y.relu_(), lambda y: y.view(2, 4, 8).neg_()),
)
BINARY: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    *(torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, lambda a, b: torch.cat((a, b), 1)[:, 2:6]),
    *(lambda a, b: a.add_(b), lambda a, b: a.mul_(b), lambda a, b: torch.where(a > b, a, b)),
)


# Each step is an op and which of the values so far it takes.
STEPS = st.lists(
    st.tuples(st.integers(0, len(UNARY) + len(BINARY) - 1), st.integers(0, 99), st.integers(0, 99)),
    min_size=2,
    max_size=8,
)


@given(STEPS)
def test_claims_hold_for_programs_of_any_ops(steps: list[tuple[int, int, int]]) -> None:
    def forward(self: nn.Module, x: Tensor) -> list[Tensor]:
        values = [x * 1, x.relu()]
        for op, i, j in steps:
            first, second = values[i % len(values)], values[j % len(values)]
            values.append(UNARY[op](first) if op < len(UNARY) else BINARY[op - len(UNARY)](first, second))
        return values

    claims(forward, data=torch.randn(2, 4, 8))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (lambda x: x.shape[0], True),
        (lambda x: x.shape[0] / x.shape[1] + 2, True),
        (lambda x: max(x.shape[0], 2) * x.size(1) // 3, True),
        # Of another batch these are below zero.
        (lambda x: x.shape[0] - 3, False),
        (lambda x: (x.shape[0] - 3) / 2 + 1, False),
        (lambda x: x.shape[0] + -3, False),
        (lambda x: -(2 - x.shape[0]), False),
    ],
)
def test_a_number_that_other_sizes_may_make_negative_is_not_claimed(number: Any, expected: bool) -> None:
    assert claims(lambda s, x: x.relu() * number(x), data=torch.randn(6, 4))[1] is expected
