"""capture: the graph computes what forward computes, for other inputs too, or an error says why not and where."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import octav_fx
from octav_fx import zoo
from octav_fx.capture.hooks import as_hooks_leave
from octav_fx.capture.modules import QuantizedModule
from octav_fx.capture.rerun import without_quantizers
from octav_fx.capture.symbolic.trace import capture
from octav_fx.errors import OctavError
from octav_fx.ir.meta import fake, info
from octav_fx.ir.printer import graph_text
from tests.support.alike import quantized_alike
from tests.support.graphs import captured, model, parameter, run_alike


def agrees(float_module: nn.Module, *inputs: dict[str, Any], training: bool = False) -> QuantizedModule:
    """Captured for the first inputs, and the bits of forward for all of them."""
    gm = captured(float_module.train(training), **inputs[0])
    for kwargs in inputs:
        assert run_alike(gm, float_module, **kwargs)
    return gm


def called(gm: fx.GraphModule) -> list[str]:
    return [str(getattr(node.target, "__name__", node.target)) for node in gm.graph.nodes if node.op.startswith("call")]


def rows(*shape: int) -> dict[str, Tensor]:
    return {"x": torch.randn(shape)}


# Forward functions of x that work for any of these shapes, and have to in a graph as well.
SYMBOLIC: dict[str, Callable[..., Any]] = {
    "shape": lambda s, x: x.view(x.shape[0], x.shape[1] * x.shape[2]),
    "size()": lambda s, x: x.reshape(x.size(0), -1) + x.size()[1],
    "unpacked": lambda s, x: (lambda b, n, d: x.reshape(b * n, d).view(b, n, d))(*x.shape),
    "negative index": lambda s, x: x.permute(2, 0, 1).reshape(x.shape[-1], -1),
    "sliced shape": lambda s, x: x.reshape(-1, *x.shape[1:]),
    "concatenated shape": lambda s, x: x.view((*x.shape[:-1], 2, 3)),
    "added shape": lambda s, x: x.view((*x.shape[:-1], 2, 3)),
    "arithmetic": lambda s, x: x[:, : x.shape[1] // 2] * x.shape[0] ** -0.5,
    "numel": lambda s, x: x / x.numel() + len(x.shape),
    "modulo": lambda s, x: F.pad(x, (0, 0, 0, (-x.shape[1]) % 4)),
    "arange": lambda s, x: x + torch.arange(x.shape[1], device=x.device)[:, None],
    "arange, start and step": lambda s, x: x[:, torch.arange(0, x.shape[1], 2)],
    "zeros": lambda s, x: x + torch.zeros(x.shape[0], 1, 6, dtype=x.dtype, device=x.device),
    "ones, eye, triu": lambda s, x: torch.ones(x.shape[1], x.shape[1]).triu(1) @ x + torch.eye(x.shape[1], 6),
    "full": lambda s, x: x + torch.full((x.shape[0], 1, 1), 2.0),
    "linspace": lambda s, x: x * torch.linspace(0, 1, x.shape[1])[:, None],
    "tensor": lambda s, x: x * torch.tensor(x.shape[1]) + torch.tensor([x.shape[0], 1.0])[0],
    "new_zeros": lambda s, x: torch.cat((x.new_zeros(x.shape[0], 1, 6), x), 1),
    "like": lambda s, x: torch.zeros_like(x) + torch.full_like(x, 2),
    "expand_as": lambda s, x: x[:, :1].expand_as(x) + x.mean(1, keepdim=True).expand(-1, x.size(1), -1),
    "interpolate": lambda s, x: F.interpolate(x, size=x.shape[-1] * 2) + F.interpolate(x, scale_factor=2),
    "dtype": lambda s, x: x.to(torch.float64).to(x.dtype) + torch.ones(6, dtype=x.dtype, device=x.device),
    "finfo": lambda s, x: x.masked_fill(x > 0, torch.finfo(x.dtype).min),
    "named result": lambda s, x: x.max(1).values + torch.max(x, 1).indices,
    "unpacked result": lambda s, x: (lambda values, indices: values * indices)(*x.topk(2)),
    "operators": lambda s, x: -(2 - x) / 3 % 2 + abs(x) ** 2 + (1 + x) * (x > 0) - 2 // (abs(x) + 1),
    "comparison": lambda s, x: torch.where((x > 0) & (x <= 1) | ~(x != x), x, 0.0),
    "layer norm": lambda s, x: F.layer_norm(x, x.shape[-1:]),
    "einsum": lambda s, x: torch.einsum("bnd,bmd->bnm", x, x),
    "rearranged like swin": lambda s, x: (
        x.view(x.shape[0], -1, 2, 3).transpose(1, 2).contiguous().view(x.shape[0], 2, -1)
    ),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_sizes_stay_symbolic(name: str) -> None:
    agrees(model(SYMBOLIC[name]), rows(2, 4, 6), rows(3, 4, 6), rows(2, 8, 6), rows(1, 2, 6))


def test_golden() -> None:
    def forward(self, x):
        x = self.fc(x) + self.bias
        return x.view(x.shape[0], -1), torch.arange(x.shape[1], device=x.device)

    gm = agrees(model(forward, fc=nn.Linear(6, 4), bias=parameter(4)), rows(2, 3, 6), rows(5, 1, 6))
    assert graph_text(gm.graph) == (
        "fc = self.fc(x)\n"
        "bias = self.bias\n"
        "add = add(fc, bias)\n"
        "getattr_1 = getattr(add, 'shape')\n"
        "getitem = getitem(getattr_1, 0)\n"
        "view = add.view(getitem, -1)\n"
        "getattr_2 = getattr(add, 'shape')\n"
        "getitem_1 = getitem(getattr_2, 1)\n"
        "getattr_3 = getattr(add, 'device')\n"
        "arange = arange(getitem_1, device=getattr_3)\n"
        "return (view, arange)"
    )


# Forward functions whose way depends on the sizes of x; those of the examples, and shapes that go another way.
BRANCHES: dict[str, tuple[Callable[..., Any], tuple[int, ...], list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    "if equal": (lambda s, x: x * 2 if x.shape[1] == 6 else x, (4, 6), [(2, 6)], [(4, 5)]),
    "if greater": (lambda s, x: x[:, :4] if x.size(1) > 4 else x, (4, 6), [(4, 6)], [(4, 3)]),
    "if shape": (lambda s, x: x * 2 if x.shape == (4, 6) else x, (4, 6), [(4, 6)], [(4, 5), (3, 6)]),
    "if in": (lambda s, x: x * 2 if x.shape[1] in (3, 6) else x, (4, 6), [(4, 6), (1, 6)], [(4, 5)]),
    "if dim()": (lambda s, x: x * 2 if x.dim() == 2 else x, (4, 6), [(1, 6)], [(4, 6, 1)]),
    "if len": (lambda s, x: x * 2 if len(x.shape) == 2 else x, (4, 6), [(1, 6)], [(4, 6, 1)]),
    "if not": (lambda s, x: x * 2 if not x.shape[1] % 2 else x, (4, 6), [(4, 8), (1, 2)], [(4, 5)]),
    "chained": (lambda s, x: x * 2 if 2 < x.shape[0] < 5 else x, (4, 6), [(3, 1)], [(5, 6), (2, 6)]),
    "for": (lambda s, x: sum(x[i] * i for i in range(x.shape[0])), (4, 6), [(4, 5)], [(3, 6)]),
    "for row": (lambda s, x: sum(row * 2 for row in x), (4, 6), [(4, 5)], [(3, 6)]),
    "list": (lambda s, x: torch.stack([a + b for a, b in zip(x, x.flip(0), strict=True)]), (4, 6), [(4, 5)], [(3, 6)]),
    "index": (lambda s, x: x * [1, 2, 3, 4, 5][x.shape[0]], (4, 6), [(4, 5)], [(3, 6)]),
    "key": (lambda s, x: x[:, : max(x.shape[0], 2)], (4, 6), [(4, 6), (4, 8)], [(1, 6)]),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_on_a_size_goes_the_way_of_the_examples_and_says_so_elsewhere(name: str) -> None:
    forward, shape, same, others = BRANCHES[name]
    gm = agrees(model(forward), rows(*shape), *(rows(*other) for other in same))
    for other in others:
        with pytest.raises(OctavError, match=r"(test_trace\.py:\d+|argument x): .* at capture, .* now"):
            gm(torch.randn(other))


def test_asserts_on_shapes_are_checks() -> None:
    def forward(self, x):
        assert x.shape[1] == 6, f"expected 6 columns, found {x.shape[1]}"
        torch._assert(x.dim() == 2, "rows only")
        return x * 2

    gm = agrees(model(forward), rows(4, 6), rows(2, 6))
    with pytest.raises(OctavError, match=r"True at capture, False now"):
        gm(torch.randn(4, 5))


class Pair(NamedTuple):
    first: Any
    second: Any


class Cached(NamedTuple):
    """Its names are also those of what a proxy has."""

    keys: Any
    value: Any
    name: Any
    owner: Any = None


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Any = None


class TestStructures:
    """Arguments and results of all kinds."""

    def test_a_list_of_features(self) -> None:
        def forward(self, features):
            outputs = [layer(feature) for layer, feature in zip(self.layers, features, strict=True)]
            return [outputs[-1] + features[0], *outputs], len(features)

        layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        one, two = ([torch.randn(n, 6) for _ in range(3)] for n in (4, 2))
        agrees(model(forward, layers=layers), {"features": one}, {"features": two})
        agrees(model(forward, layers=layers), {"features": tuple(one)}, {"features": tuple(two)})

    def test_a_dict(self) -> None:
        def forward(self, batch):
            found = {key: value * 2 for key, value in batch.items() if key != "label"}
            total = sum(batch.values()) + batch["a"] + sum(batch[key] for key in batch)
            return {**found, "total": total, "keys": list(batch.keys()), "has": "b" in batch, "nested": {"a": [total]}}

        one, two = ({key: torch.randn(n, 6) for key in "ab"} for n in (4, 2))
        agrees(model(forward), {"batch": one}, {"batch": two})

    def test_nested_arguments(self) -> None:
        def forward(self, tree):
            (a, b), rest = tree
            return a + b + rest["c"][0]

        one, two = (((torch.randn(n), torch.randn(n)), {"c": [torch.randn(n)]}) for n in (3, 5))
        agrees(model(forward), {"tree": one}, {"tree": two})

    def test_named_tuples_and_data_classes(self) -> None:
        def forward(self, pair):
            return Pair(pair.first + pair.second, Output(pair[0], hidden=(pair[1],)))

        gm = captured(model(forward), pair=Pair(torch.ones(2), torch.ones(2)))
        first, second = torch.randn(3), torch.randn(3)
        found = gm(Pair(first, second))
        assert type(found) is Pair and type(found.second) is Output
        assert torch.equal(found.first, first + second) and torch.equal(found.second.hidden[0], second)

    def test_fields_named_as_what_stands_for_them_is(self) -> None:
        def forward(self, layer):
            return layer.keys.relu() * layer.value.shape[0] + layer.name + (layer.owner or 1)

        one, two = (Cached(torch.randn(n), torch.randn(n), 3.0, 2.0) for n in (3, 5))
        agrees(model(forward), {"layer": one}, {"layer": two})

    def test_results_that_are_no_tensors(self) -> None:
        agrees(model(lambda self, x: (x, None, 3, "name", x.shape, x.shape[0] + 1)), rows(4, 6), rows(2, 6))

    def test_none_and_python_values_are_facts_of_the_graph(self) -> None:
        def forward(self, x, mask=None, scale=1.0, flag=False, mode="up"):
            x = x * scale if mask is None else x * mask
            return {"up": x + 1, "down": x - 1}[mode] if flag else x

        gm = agrees(model(forward), {**rows(4, 6), "mask": None, "scale": 2.0, "flag": True, "mode": "down"})
        for name, value in {"mask": torch.ones(6), "scale": 3.0, "flag": False, "mode": "up"}.items():
            arguments = {**rows(4, 6), "mask": None, "scale": 2.0, "flag": True, "mode": "down", name: value}
            with pytest.raises(OctavError, match=rf"argument {name}: .* at capture, .* now"):
                gm(**arguments)
        agrees(model(forward), {**rows(4, 6), "mask": torch.ones(6), "scale": 1.0, "flag": False, "mode": "up"})

    def test_defaults_are_those_of_forward(self) -> None:
        float_module = model(lambda self, x, scale=2.0, mask=None: x * scale)
        q = octav_fx.quantize(float_module, torch.ones(2, 2))
        x = torch.randn(3, 2)
        assert (
            torch.equal(q(x), x * 2) and torch.equal(q(x, mask=None), x * 2) and torch.equal(q(x=x, scale=2.0), x * 2)
        )

    def test_positional_keyword_and_collected_arguments(self) -> None:
        def forward(self, x, *features, scale=1.0, **named):
            return x * scale + sum(features) + named["bias"] + sum(named.values())

        arguments = {
            "x": torch.ones(2),
            "features": (torch.ones(2),) * 2,
            "scale": 1.0,
            "named": {"bias": torch.ones(2)},
        }
        with pytest.raises(OctavError, match=r"\*features.*scale.*give it a default before"):
            capture(model(forward), arguments)


@fx.wrap
def hidden(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight).relu() if x.shape[1] == 6 else x


@fx.wrap
def data_dependent(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


@fx.wrap
def paired(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.chunk(2, 1)


def test_functions_hidden_by_fx_wrap_are_traced_through() -> None:
    gm = agrees(model(lambda self, x: hidden(x, self.fc.weight) + 1, fc=nn.Linear(6, 4)), rows(4, 6), rows(2, 6))
    assert called(gm) == ["linear", "relu", "add"]


def test_a_hidden_function_that_cannot_be_traced_stays_a_call() -> None:
    gm = captured(model(lambda self, x: data_dependent(x + 1) @ x.t()), **rows(2, 6))
    assert called(gm) == ["add", "data_dependent", "t", "matmul"]
    for x in (torch.ones(2, 6), -torch.ones(2, 6) * 3):
        assert torch.equal(gm(x), data_dependent(x + 1) @ x.t())


def test_a_hidden_function_that_returns_a_tuple() -> None:
    agrees(model(lambda self, x: paired(x)[0] + paired(x)[1]), rows(4, 6), rows(2, 6))


def test_torchvisions_stochastic_depth_stays_random() -> None:
    zoo.torchvision()
    from torchvision.ops import StochasticDepth

    drop = StochasticDepth(0.5, "row")
    float_module = model(lambda self, x: x + self.drop(x * 2), drop=drop)
    gm = captured(float_module.train(), **rows(8, 2))
    assert "drop" in called(gm) or "stochastic_depth" in called(gm)
    x = torch.ones(64, 2)
    torch.manual_seed(0)
    gm.train()
    first, second = gm(x), gm(x)
    assert not torch.equal(first, second) and len(first.unique()) == 2
    gm.eval()
    assert torch.equal(gm(x), x * 3)
    assert not captured_depends(float_module)


def captured_depends(float_module: nn.Module) -> tuple[str, ...]:
    return capture(float_module, rows(8, 2)).depends_on_training


def test_a_module_of_ones_own_that_is_only_on_or_off_stays_a_call() -> None:
    class DropPath(nn.Module):
        def forward(self, x):
            if not self.training:
                return x
            return x * x.new_empty(x.shape[0], 1).bernoulli_(0.5)

    float_module = model(lambda self, x: self.fc(self.drop(x)), drop=DropPath(), fc=nn.Linear(2, 2))
    assert captured_depends(float_module) == ()
    gm = captured(float_module, **rows(8, 2))
    assert called(gm) == ["drop", "fc"]


@pytest.mark.slow
def test_dropout_follows_the_mode_at_run_time() -> None:
    def forward(self, x):
        return F.dropout(x, 0.5, training=self.training) + F.dropout(x, 0.5, self.training) + self.drop(x)

    float_module = model(forward, drop=nn.Dropout())
    result = capture(float_module, rows(4, 6))
    assert result.depends_on_training == ()
    q = octav_fx.quantize(float_module, torch.ones(4, 6))
    x = torch.ones(4, 6)
    assert torch.equal(q(x), x * 3)
    assert not torch.equal(q.train()(x), q(x))
    assert torch.equal(q.eval()(x), x * 3)


def test_code_that_asks_for_the_mode_has_a_graph_for_each() -> None:
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.aux = nn.Linear(6, 2), nn.Linear(6, 3)

        def forward(self, x):
            if self.training:
                return self.fc(x), self.aux(x)
            return self.fc(x)

    float_module, x = nn.Sequential(Aux()), torch.randn(4, 6)
    assert capture(float_module, {"input": x}).depends_on_training == ("0.training",)
    q = octav_fx.quantize(float_module, x)
    with octav_fx.float_mode(q):
        for mode in (True, False):
            assert run_alike(q.train(mode), float_module.train(mode), x)
    for mode in (True, False):
        q.train(mode)
        names = [name for name in called(q) if name.startswith("quantizers")]
        assert len(names) == (3 if mode else 2)


ERRORS: dict[str, tuple[Callable[..., Any], str]] = {
    "branch": (lambda self, x: x if x.sum() > 0 else -x, r"forward needs bool\(gt\), which depends on the data"),
    "item": (
        lambda self, x: x * 2 if x[0, 0].item() > 0 else x,
        r"forward needs bool\(\w+\), which depends on the data",
    ),
    "loop": (lambda self, x: sum(x[i] for i in range(x.argmax())), r"forward needs int\(argmax\)"),
    "float": (lambda self, x: x * float(x.sum()), r"forward needs float\(sum_1\)"),
    "index by data": (lambda self, x: self.parts[x.argmax()](x), r"int|indices must be"),
    "shapes": (lambda self, x: x @ x, r"capture stopped at .*RuntimeError"),
    "unknown attribute": (lambda self, x: x.nothing, r"capture stopped at .*has no attribute 'nothing'"),
    "missing": (lambda self, x: undefined(x), r"capture stopped at .*NameError"),  # noqa: F821
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_names_the_users_file_and_line(name: str) -> None:
    forward, words = ERRORS[name]
    float_module = model(lambda self, x: self.inner(x), inner=model(forward, parts=nn.ModuleList([nn.Identity()])))
    line = forward.__code__.co_firstlineno
    with pytest.raises(OctavError, match=words) as raised:
        capture(float_module, rows(4, 6))
    assert f"test_trace.py:{line}" in str(raised.value)


def test_buffers_are_read_when_the_graph_runs() -> None:
    float_module = model(lambda self, x: x * self.inner.scale + self.shift, inner=nn.Module(), shift=torch.ones(6))
    float_module.inner.register_buffer("scale", torch.ones(6))
    gm = agrees(float_module, rows(4, 6))
    gm.shift.fill_(3)
    gm.inner.scale = torch.full((6,), 2.0)
    x = torch.randn(2, 6)
    assert torch.equal(gm(x), x * 2 + 3)


def test_a_tied_parameter_is_one_node_by_its_first_name() -> None:
    float_module = model(lambda self, x: x @ self.a @ self.b, a=parameter(6, 6))
    float_module.b = float_module.a
    gm = agrees(float_module, rows(4, 6))
    assert [node.target for node in gm.graph.nodes if node.op == "get_attr"] == ["a"]


def test_constants_become_buffers_that_no_checkpoint_holds() -> None:
    table = torch.randn(6)
    float_module = model(lambda self, x: x * table + torch.from_numpy(table.numpy()).exp())
    gm = agrees(float_module, rows(4, 6), rows(2, 6))
    assert len(list(gm.named_buffers())) == 2 and not gm.state_dict()
    assert gm.double()(torch.ones(1, 6, dtype=torch.float64)).dtype is torch.float64


# What is drawn or written in one call must not be there in the next.
EVERY_CALL: dict[str, Callable[..., Any]] = {
    "rand": lambda self, x: x + torch.rand(6),
    "randn": lambda self, x: x + torch.randn(x.shape[0], 6, device=x.device),
    "randint": lambda self, x: x + torch.randint(0, 99, (6,)),
    "randperm": lambda self, x: x[:, torch.randperm(6)],
    "rand_like": lambda self, x: x + torch.rand_like(x),
    "bernoulli": lambda self, x: x * torch.bernoulli(torch.full((6,), 0.5)),
    "bernoulli_": lambda self, x: x * x.new_empty(x.shape).bernoulli_(0.5),
    "normal": lambda self, x: x + torch.normal(0.0, 1.0, (6,)),
    "zeros, added to": lambda self, x: torch.zeros(4, 6).add_(x),
    "ones, overwritten": lambda self, x: torch.ones(6).mul_(x[0]) + x,
    "tensor, added to": lambda self, x: torch.tensor([0.0]).add_(x.sum()) + x,
}


@pytest.mark.parametrize("name", EVERY_CALL)
def test_what_forward_makes_it_makes_at_every_call(name: str) -> None:
    x = rows(4, 6)
    gm = agrees(model(EVERY_CALL[name]), x, x, {"x": x["x"] * 2})
    if "," not in name:
        assert not torch.equal(gm(**x), gm(**x))


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "method": lambda y: y.add_(1),
    "view": lambda y: y.view(-1)[3:].neg_(),
    "function": lambda y: F.relu(y, inplace=True),
    "out": lambda y: torch.mul(y, 2, out=y),
    "copy": lambda y: y[0].copy_(y[1]),
    "scatter": lambda y: y.scatter_(1, torch.zeros(4, 1, dtype=torch.int64), 9.0),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_writes_in_place_happen_where_they_did(name: str) -> None:
    def forward(self, x):
        y = x * 2
        before = y + 0
        z = y.t()
        IN_PLACE[name](y)
        return before, y, z

    agrees(model(forward), rows(4, 6), rows(4, 6))


def test_a_write_into_an_argument_reaches_the_caller() -> None:
    gm = captured(model(lambda self, x: x.mul_(2).sum()), **rows(4, 6))
    x = torch.ones(4, 6)
    gm(x)
    assert torch.equal(x, torch.full((4, 6), 2.0))


def test_isinstance_is_answered_for_the_value() -> None:
    def forward(self, x):
        if isinstance(x, (list, tuple)):
            x = x[0]
        x = [x] if isinstance(x, Tensor) else x
        assert torch.is_tensor(x[0]) and not isinstance(x[0], nn.Parameter)
        return x[0] * 2 if isinstance(x, list) else None

    agrees(model(forward), rows(4, 6))
    agrees(model(forward), {"x": [torch.randn(3)]}, {"x": [torch.randn(5)]})
    # Afterwards the name means what it meant.
    assert "isinstance" not in globals()


SEQUENCES = {"query": torch.randn(2, 5, 8), "key": torch.randn(2, 3, 8), "value": torch.randn(2, 3, 8)}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 8, "vdim": 8, "add_bias_kv": True, "add_zero_attn": True}]
)
def test_multihead_attention(
    need_weights: bool, batch_first: bool, dropout: float, training: bool, options: Any
) -> None:
    def forward(self, query, key, value):
        return self.attention(query, key, value, need_weights=need_weights)

    def swapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors if batch_first else {name: x.transpose(0, 1) for name, x in tensors.items()}

    attention = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=batch_first, **options)
    other = {name: torch.randn(3, *x.shape[1:]) for name, x in SEQUENCES.items()}
    gm = agrees(model(forward, attention=attention), swapped(SEQUENCES), swapped(other), training=training)
    assert "multi_head_attention_forward" not in called(gm)


@pytest.mark.parametrize("average", [True, False])
def test_attention_of_a_sequence_to_itself(average: bool) -> None:
    def forward(self, x):
        return self.attention(x, x, x, average_attn_weights=average)

    float_module = model(forward, attention=nn.MultiheadAttention(8, 2, batch_first=True))
    gm = agrees(float_module, rows(2, 5, 8), rows(3, 7, 8))
    # One projection of all three, as in torch, and the one of the output.
    assert called(gm).count("linear") == 2


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder_layer(batch_first: bool, norm_first: bool, training: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=batch_first, norm_first=norm_first)
    agrees(model(lambda self, x: self.layer(x), layer=layer), rows(2, 5, 8), rows(3, 5, 8), training=training)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_transformer(training: bool) -> None:
    transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    one, two = ({"source": torch.randn(n, 5, 8), "target": torch.randn(n, 3, 8)} for n in (2, 3))
    float_module = model(lambda self, source, target: self.transformer(source, target), transformer=transformer)
    agrees(float_module, one, two, training=training)


def test_recurrent_layers_are_leaves() -> None:
    def forward(self, x):
        y, (h, c) = self.lstm(x)
        return self.gru(y)[0] + h[-1] + c[-1]

    gm = agrees(model(forward, lstm=nn.LSTM(6, 4, 2), gru=nn.GRU(4, 4)), rows(3, 2, 6), rows(5, 2, 6))
    assert called(gm)[:1] == ["lstm"] and "gru" in called(gm)


def test_a_module_made_inside_forward() -> None:
    agrees(model(lambda self, x: nn.Softmax(-1)(nn.Flatten()(x))), rows(4, 2, 3), rows(2, 2, 3))


def test_a_scripted_module_is_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 4), nn.ReLU()))
    with pytest.raises(OctavError, match=r"part is a scripted module"):
        capture(model(lambda self, x: self.part(x) + 1, part=scripted), rows(4, 6))


def test_a_size_behind_many_sums_is_found_once() -> None:
    # As many ways lead to the input as there are subsets of the sums.
    def forward(self, x):
        for _ in range(40):
            x = x + x.relu()
        return x.view(x.size(0), -1)

    agrees(model(forward), rows(4, 6), rows(2, 6))


def test_checkpointing_is_traced_through() -> None:
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.fc, x, use_reentrant=False)

    recomputing = model(forward, fc=nn.Linear(6, 4))
    agrees(recomputing, rows(4, 6), rows(2, 6))
    line = f"{__file__}:{forward.__code__.co_firstlineno + 1}"
    reason = f"forward has a part of it recomputed in backward (torch.utils.checkpoint at {line})"
    assert capture(recomputing, rows(4, 6)).around == {forward.__code__: reason}


def snapshot(root: nn.Module) -> dict[str, Any]:
    return {
        f"{path}.{name}": {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()}
        if name in ("_parameters", "_buffers")
        else value
        for path, module in root.named_modules()
        for name, value in vars(module).items()
        if name != "_modules"
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert set(before) == set(after)
    for name, value in before.items():
        if isinstance(value, dict):
            assert set(value) == set(after[name])
            assert all(torch.equal(a, after[name][k]) if isinstance(a, Tensor) else True for k, a in value.items()), (
                name
            )
        else:
            assert type(value) is type(after[name]), name


class Busy(nn.Module):
    """Everything that a run would change: statistics, hints, and a parameter in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout()
        self.embed = nn.Embedding(4, 3, max_norm=0.1)
        self.attention = nn.MultiheadAttention(3, 1, dropout=0.1)
        self.fail = False

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        x = self.drop(self.bn(self.conv(x))).flatten(2).mean(-1) + self.embed(i)
        x = self.attention(x, x, x)[0] if self.training else x
        if self.fail:
            raise ValueError("as asked")
        return x


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_module_is_as_before(fail: bool, training: bool) -> None:
    root = Busy().train(training)
    root.bn.eval()
    root.fail = fail
    modes = {name: m.training for name, m in root.named_modules()}
    arguments = {"x": torch.randn(2, 2, 5, 5), "i": torch.tensor([0, 3])}
    before, functions, random = snapshot(root), {name: vars(torch)[name] for name in dir(torch)}, torch.get_rng_state()
    inputs = {name: value.clone() for name, value in arguments.items()}
    if fail:
        with pytest.raises(OctavError, match="as asked"):
            capture(root, arguments)
    else:
        capture(root, arguments)
    assert_same(before, snapshot(root))
    assert {name: m.training for name, m in root.named_modules()} == modes
    assert all(type(m.training) is bool for m in root.modules())
    assert all(torch.equal(arguments[name], value) for name, value in inputs.items())
    assert torch.equal(torch.get_rng_state(), random)
    # Functions of torch that were looked through are torch's own again.
    assert all(vars(torch)[name] is function for name, function in functions.items())


def test_values_and_macs_are_there_for_the_passes() -> None:
    graph = capture(model(lambda self, x: self.fc(x).sum(), fc=nn.Linear(6, 4)), rows(3, 6)).graph
    nodes = {node.name: node for node in graph.nodes}
    assert fake(nodes["x"]).shape == (3, 6) and fake(nodes["fc"]).shape == (3, 4)
    assert [info(nodes[name]).macs for name in ("x", "fc", "sum_1")] == [0, 3 * 6 * 4, 0]


def test_hooks_of_leaves_run_in_the_graph() -> None:
    float_module = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    float_module[0].register_forward_hook(lambda module, args, y: y * 2)
    float_module[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    agrees(float_module, {"input": torch.randn(4, 6)}, {"input": torch.randn(2, 6)})


def test_hooks_of_traced_modules_are_passed_by_and_told() -> None:
    seen: list[Any] = []
    inner = nn.Sequential(nn.Linear(6, 4))
    inner.register_forward_hook(lambda module, args, y: seen.append(y))
    captured = capture(nn.Sequential(inner, nn.ReLU()), {"input": torch.randn(4, 6)})
    assert captured.hooked == ("0",) and seen == [] and len(inner._forward_hooks) == 1
    # Hooks may change what they see in any call: nothing is known of it.
    nodes = [node for node in captured.graph.nodes if node.target is as_hooks_leave]
    assert [str(node.args[0]) for node in nodes] == ["input_1", "_0_0"]
    assert capture(inner, {"input": torch.randn(4, 6)}).hooked == ()


def test_a_subclass_of_a_container_with_a_forward_of_its_own() -> None:
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    agrees(nn.Sequential(Residual(nn.Linear(6, 6), nn.ReLU())), {"input": torch.randn(4, 6)})


def test_gradients_are_those_of_forward() -> None:
    def forward(self, x):
        return (F.gelu(self.fc(x)) @ self.w).softmax(-1)[:, 0].log().sum()

    float_module = model(forward, fc=nn.Linear(6, 4), w=parameter(4, 3))
    gm = captured(float_module, **rows(4, 6))
    x = torch.randn(4, 6)
    parameters = list(float_module.parameters())
    for a, b in zip(
        torch.autograd.grad(gm(x), parameters), torch.autograd.grad(float_module(x), parameters), strict=True
    ):
        assert torch.equal(a, b)


def test_writing_into_a_part_of_a_tensor() -> None:
    def forward(self, x):
        y = x.clone()
        y[:, 1:3] = 2.0
        y[0] += x[1]
        return y

    agrees(model(forward), rows(4, 6), rows(2, 6))


def test_an_ordered_dict_stays_one() -> None:
    gm = agrees(model(lambda self, x: OrderedDict(out=x * 2, aux=[x])), rows(4, 6))
    assert type(gm(torch.ones(1, 2))) is OrderedDict


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [None, True])
def test_a_transformer_encoder_with_a_mask(is_causal: bool | None) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    float_module = model(lambda self, x, mask: self.encoder(x, mask=mask, is_causal=is_causal), encoder=encoder)
    x, mask = torch.randn(2, 5, 8), nn.Transformer.generate_square_subsequent_mask(5)
    found = captured(float_module, x=x, mask=mask)(x, mask)
    # Without the hint that the mask is causal, attention adds it up in another order: 8 products and a softmax over 5.
    torch.testing.assert_close(found, float_module(x, mask), rtol=1e-5, atol=1e-5)


def test_mode_compared_with_a_bool() -> None:
    float_module = model(lambda self, x: x * 2 if self.training == True else x)  # noqa: E712
    assert capture(float_module, rows(4, 6)).depends_on_training == ("training",)


def test_layers_that_were_altered_are_traced_through() -> None:
    class Doubled(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight * 2, bias)

    replaced = nn.Linear(6, 4)
    replaced.forward = lambda x: F.linear(x, replaced.weight) * 2
    agrees(model(lambda self, x: self.conv(x), conv=Doubled(2, 3, 3)), {"x": torch.randn(1, 2, 6, 6)})
    assert called(agrees(model(lambda self, x: self.fc(x), fc=replaced), rows(4, 6))) == ["linear", "mul"]


@pytest.mark.parametrize("name", ["meta", "graph", "examples", "modes", "quantizers"])
def test_a_buffer_of_a_name_that_a_graph_module_needs_stays_and_the_model_is_quantized_in_parts(name: str) -> None:
    float_module, x = model(lambda self, x: self.fc(x), fc=nn.Linear(6, 4)), torch.randn(4, 6)
    float_module.register_buffer(name, torch.ones(1))
    q = octav_fx.quantize(float_module, x)
    assert list(q.state_dict()) == list(float_module.state_dict())
    assert torch.equal(getattr(q, name), torch.ones(1))
    assert f"the model: in parts, because Model.{name}: octav_fx needs that name" in octav_fx.table(q)
    with octav_fx.float_mode(q):
        assert torch.equal(q(x), float_module(x))


@pytest.mark.parametrize("kind", [list, tuple, lambda tensors: dict(zip("abcd", tensors, strict=False))])
def test_a_collection_of_another_length_is_another_graph(kind: Any) -> None:
    def forward(self, xs):
        return sum(self.fc(x) for x in (xs.values() if isinstance(xs, dict) else xs))

    float_module, tensors = model(forward, fc=nn.Linear(4, 4)), torch.randn(3, 2, 4).unbind()
    q = octav_fx.quantize(float_module, {"xs": kind(tensors[:2])})
    assert q(kind(tensors[1:])).shape == (2, 4)
    for other in (tensors[:1], tensors):
        q(kind(other))
        with without_quantizers(q):
            torch.testing.assert_close(q(kind(other)), float_module(kind(other)), rtol=0, atol=1e-6)
    assert len(q.graphs_of(False)) == 3


# Python around tensors that must neither stop a trace nor fix a size; functions of the model and [B, T, 8].


def checked(s: Any, x: Tensor) -> Tensor:
    torch._check(x.shape[0] > 0)
    torch._check(x.shape[-1] == 8, lambda: f"{x.shape}")
    torch._check_with(ValueError, x.dim() == 3, lambda: "three axes")
    torch._check_value(x.shape[1] > 0)
    torch._check_tensor_all(x == x)
    return s.fc(x)


def distributed(s: Any, x: Tensor) -> Any:
    normal = torch.distributions.Normal(s.fc(x), F.softplus(s.fc(x)) + 0.1)
    return normal.rsample(), normal.log_prob(x), torch.distributions.Categorical(logits=s.fc(x)).entropy()


class Placed(nn.Module):
    """Takes a device and a dtype."""

    def forward(self, x: Tensor, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.arange(x.shape[1], device=device, dtype=dtype)[:, None]


AROUND: dict[str, Callable[..., Any]] = {
    "torch._check": checked,
    "torch.distributions": distributed,
    "a NumPy number": lambda s, x: s.fc(x) / np.sqrt(2.0) + np.float32(0.5) * x,
    "a NumPy number first": lambda s, x: np.sqrt(2.0) * s.fc(x) + np.int64(3),
    "a NumPy array": lambda s, x: s.fc(x) + torch.tensor(np.linspace(0, 1, 8), dtype=x.dtype),
    "np.prod of sizes": lambda s, x: s.fc(x).reshape(-1, np.prod(x.shape[1:])),
    "a device": lambda s, x: s.fc(x) + s.placed(x, device=x.device, dtype=x.dtype),
}


@pytest.mark.parametrize("name", AROUND)
def test_python_around_tensors(name: str) -> None:
    float_model = model(AROUND[name], fc=nn.Linear(8, 8), placed=Placed())
    quantized_alike(float_model, (torch.randn(2, 5, 8),), (torch.randn(3, 7, 8),))


@pytest.mark.slow
def test_a_device_as_an_argument_of_a_module_in_parts() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.fc(s.block(x, device=x.device)) if x.sum().item() < 1e9 else x

    class Block(Placed):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor, device: Any = None, dtype: Any = None) -> Tensor:
            return self.fc(x) + super().forward(x, device, dtype)

    q = quantized_alike(model(forward, fc=nn.Linear(8, 8), block=Block()), (torch.randn(2, 5, 8),), parts=True)
    assert octav_fx.coverage(q).skipped == []


def test_a_check_that_fails_later_says_so() -> None:
    gm = captured(model(checked, fc=nn.Linear(8, 8)), x=torch.randn(2, 5, 8))
    with pytest.raises(AssertionError, match=r"test_trace\.py:\d+: the check there fails"):
        gm(torch.full((2, 5, 8), float("nan")))


@pytest.mark.slow
def test_modules_of_generated_code_are_traced_through() -> None:
    float_module = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    traced = fx.symbolic_trace(float_module)
    q = quantized_alike(nn.Sequential(traced, nn.Linear(8, 4)), (torch.randn(2, 8),), (torch.randn(3, 8),))
    assert octav_fx.coverage(q).quantized_macs == 2 * (8 * 8 + 8 * 4)
    quantized_alike(traced, (torch.randn(2, 8),), (torch.randn(3, 8),))


class Yields(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        yield self.a(x)


class Waits(Yields):
    async def forward(self, x: Tensor) -> Any:
        return self.a(x)


@pytest.mark.parametrize("kind", [Yields, Waits])
def test_a_forward_that_computes_later_is_named(kind: type[nn.Module]) -> None:
    with pytest.raises(OctavError, match=f"forward of {kind.__name__} is a generator or async"):
        octav_fx.quantize(kind(), torch.randn(2, 4))
