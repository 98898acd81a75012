"""deduplicate_quantizers: one quantizer for each value, unless something writes into the value between its readers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octav_fx.capture.modules import QuantizedModule
from octav_fx.ir.printer import graph_text
from octav_fx.nn import Settings
from octav_fx.passes import Place, deduplicate_quantizers
from tests.support.graphs import model, parameter, run_alike
from tests.support.passes import canonical, declined, four_bits, made, on_grid, quantize_with
from tests.support.settings import settings_of


def quantized(
    float_module: nn.Module, choose: Callable[[Place], Settings | str] = four_bits, **x: Tensor
) -> QuantizedModule:
    gm = canonical(float_module, **x)
    made(gm, quantize_with(choose))
    return gm


def shared(gm: QuantizedModule) -> list[tuple[str, str]]:
    return [(edit.node, edit.detail) for edit in made(gm, deduplicate_quantizers)]


def unsigned_bits(place: Place) -> Settings:
    return settings_of(4 if place.signed else 5, place.signed, place.dim, "octav", "pwl")


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)


def test_golden() -> None:
    x = torch.randn(2, 4)
    gm = quantized(Projections().eval(), x=x)
    assert graph_text(gm.graph) == (
        "q_weight = self.q.weight\n"
        "quantizers_q_input = self.quantizers.q_input(x)\n"
        "quantizers_q_weight = self.quantizers.q_weight(q_weight)\n"
        "q = linear(quantizers_q_input, quantizers_q_weight, None)\n"
        "k_weight = self.k.weight\n"
        "quantizers_k_input = self.quantizers.k_input(x)\n"
        "quantizers_k_weight = self.quantizers.k_weight(k_weight)\n"
        "k = linear(quantizers_k_input, quantizers_k_weight, None)\n"
        "v_weight = self.v.weight\n"
        "quantizers_v_input = self.quantizers.v_input(x)\n"
        "quantizers_v_weight = self.quantizers.v_weight(v_weight)\n"
        "v = linear(quantizers_v_input, quantizers_v_weight, None)\n"
        "return (q, k, v)"
    )
    before = gm(x)
    assert shared(gm) == [
        ("quantizers.k_input", "quantizers.q_input"),
        ("quantizers.v_input", "quantizers.q_input"),
    ]
    text = graph_text(gm.graph)
    assert text == (
        "q_weight = self.q.weight\n"
        "quantizers_q_input = self.quantizers.q_input(x)\n"
        "quantizers_q_weight = self.quantizers.q_weight(q_weight)\n"
        "q = linear(quantizers_q_input, quantizers_q_weight, None)\n"
        "k_weight = self.k.weight\n"
        "quantizers_k_weight = self.quantizers.k_weight(k_weight)\n"
        "k = linear(quantizers_q_input, quantizers_k_weight, None)\n"
        "v_weight = self.v.weight\n"
        "quantizers_v_weight = self.quantizers.v_weight(v_weight)\n"
        "v = linear(quantizers_q_input, quantizers_v_weight, None)\n"
        "return (q, k, v)"
    )
    assert all(torch.equal(a, b) for a, b in zip(gm(x), before, strict=True))
    assert shared(gm) == [] and graph_text(gm.graph) == text


# forward, parts, shape of x -> what is shared.
SHARED = {
    "both sides of a product": (
        lambda self, x: torch.matmul(x, x),
        {},
        (3, 3),
        [("quantizers.matmul_other", "quantizers.matmul_input")],
    ),
    "query, key and value": (
        lambda self, x: F.scaled_dot_product_attention(x, x, x),
        {},
        (2, 3, 4),
        [(f"quantizers.attention_{name}", "quantizers.attention_query") for name in ("key", "value")],
    ),
    "a residual fork": (
        lambda self, x: self.a(y := x.relu()) + self.b(y),
        {"a": nn.Conv2d(2, 3, 3, padding=1), "b": nn.Conv2d(2, 3, 1)},
        (1, 2, 5, 5),
        [("quantizers.b_input", "quantizers.a_input")],
    ),
    "the weight of a module called twice": (
        lambda self, x: self.a(self.a(x)),
        {"a": nn.Linear(4, 4)},
        (2, 4),
        [("quantizers.a_1_weight", "quantizers.a_weight")],
    ),
    "a tied weight": (
        lambda self, x: F.linear(self.a(x), self.a.weight),
        {"a": nn.Linear(4, 4)},
        (2, 4),
        [("quantizers.a_1_weight", "quantizers.a_weight")],
    ),
    "a write before both": (
        lambda self, x: self.a(y := (x * 2).add_(1)) + self.b(y),
        {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)},
        (2, 4),
        [("quantizers.b_input", "quantizers.a_input")],
    ),
    "a write after both": (
        lambda self, x: (self.a(y := x * 2), self.b(y), y.add_(1)),
        {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)},
        (2, 4),
        [("quantizers.b_input", "quantizers.a_input")],
    ),
    "a write elsewhere": (
        lambda self, x: (self.a(y := x * 2), (x + 1).mul_(2), self.b(y)),
        {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)},
        (2, 4),
        [("quantizers.b_input", "quantizers.a_input")],
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_one_value_is_quantized_once(name: str) -> None:
    forward, parts, shape, expected = SHARED[name]
    x = torch.randn(shape)
    gm = quantized(model(forward, **parts), x=x)
    graphs = torch.fx.GraphModule(gm, gm.graph.__deepcopy__({}))
    assert shared(gm) == expected
    assert run_alike(gm, graphs, x)
    text = graph_text(gm.graph)
    assert shared(gm) == [] and graph_text(gm.graph) == text


DIFFERENT = {
    "other values": (lambda self, x: self.a(x) + self.b(x + 1), four_bits),
    "other weights": (lambda self, x: self.a(x) @ self.b(x + 1).t(), four_bits),
    "other bits": (
        lambda self, x: self.a(x) + self.b(x),
        lambda place: settings_of(4 if place.site == "a" else 8, place.signed, place.dim, "octav", "pwl"),
    ),
    "other gradient": (
        lambda self, x: self.a(x) + self.b(x),
        lambda place: settings_of(4, place.signed, place.dim, "octav", "pwl" if place.site == "a" else "ste"),
    ),
    "another method": (
        lambda self, x: self.a(x) + self.b(x),
        lambda place: settings_of(4, place.signed, place.dim, "octav" if place.site == "a" else "max", "pwl"),
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_unlike_quantizers_stay_apart(name: str) -> None:
    forward, choose = DIFFERENT[name]
    gm = quantized(model(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), choose, x=torch.randn(4, 4))
    text = graph_text(gm.graph)
    assert shared(gm) == [] and graph_text(gm.graph) == text


def test_a_parameter_as_weight_of_one_operand_and_another_axis_of_the_next_stays_apart() -> None:
    gm = quantized(model(lambda self, x: (x @ self.w) @ self.w, w=parameter(4, 4)), x=torch.randn(2, 4))
    assert shared(gm) == [("quantizers.matmul_1_other", "quantizers.matmul_other")]
    gm = quantized(model(lambda self, x: F.linear(x @ self.w, self.w), w=parameter(4, 4)), x=torch.randn(2, 4))
    assert shared(gm) == []


def write_between(write: Callable[[Tensor], object]) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(self, x):
        y = x * 2
        first = F.linear(y, self.a.weight)
        write(y)
        return first + F.linear(y, self.b.weight)

    return forward


WRITES = {
    "method": lambda y: y.add_(1),
    "item": lambda y: y[0].fill_(3.0),
    "view": lambda y: y.view(-1)[:3].neg_(),
    "transposed": lambda y: y.t().mul_(2),
    "slice of a flattened copy-free reshape": lambda y: y.reshape(-1)[1::2].zero_(),
    "function with inplace=True": lambda y: F.relu(y, inplace=True),
    "function, inplace by position": lambda y: F.hardtanh(y, -0.1, 0.1, True),
    "function ending in _": lambda y: torch.relu_(y),
    "chunk": lambda y: y.chunk(2, 1)[1].exp_(),
    "through a dropout that returns its input": lambda y: F.dropout(y, 0.5, training=False).neg_(),
    "through detach": lambda y: y.detach().neg_(),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_between_two_readers_keeps_two_quantizers(name: str) -> None:
    forward = write_between(WRITES[name])
    float_module, x = model(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), torch.randn(2, 4)
    gm = quantized(float_module, x=x)
    text = graph_text(gm.graph)
    reason = "not shared with quantizers.a_input: mul is written in place between"
    assert declined(gm, deduplicate_quantizers) == [("quantizers.b_input", None, reason)]
    assert graph_text(gm.graph) == text

    weights = [on_grid(layer.weight, True, 0) for layer in (float_module.a, float_module.b)]
    y = x * 2
    expected = F.linear(on_grid(y, True, None), weights[0])
    WRITES[name](y)
    expected = expected + F.linear(on_grid(y, True, None), weights[1])
    assert torch.equal(gm(x), expected)


def test_readers_before_and_after_a_write_share_among_themselves() -> None:
    def forward(self, x):
        y = x * 2
        before = self.a(y) + self.b(y)
        y.add_(1)
        return before + self.c(y) + self.d(y)

    gm = quantized(model(forward, **{name: nn.Linear(4, 4) for name in "abcd"}), x=torch.randn(2, 4))
    assert shared(gm) == [
        ("quantizers.b_input", "quantizers.a_input"),
        ("quantizers.d_input", "quantizers.c_input"),
    ]


def test_a_module_that_writes_in_place_keeps_two_quantizers() -> None:
    def forward(self, x):
        y = x * 2
        first = self.a(y)
        self.act(y)
        return first + self.b(y)

    parts = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "act": nn.ReLU(inplace=True)}
    gm = quantized(model(forward, **parts), x=torch.randn(2, 4))
    assert [node for node, _, _ in declined(gm, deduplicate_quantizers)] == ["quantizers.b_input"]


def test_signed_and_unsigned_quantizers_of_one_value_cannot_be() -> None:
    # The sign belongs to the value, so every reader of it asks for the same one.
    gm = quantized(
        model(lambda self, x: self.a(y := x.relu()) @ self.b(y).t(), a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        unsigned_bits,
        x=torch.randn(4, 4),
    )
    assert shared(gm) == [("quantizers.b_input", "quantizers.a_input")]


def test_the_gradient_is_that_of_two_quantizers() -> None:
    float_module = model(lambda self, x: self.a(x) + self.b(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4)).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    gm = quantized(float_module, x=x)
    seed = torch.randn(3, 4, dtype=torch.float64)
    (apart,) = torch.autograd.grad(gm(x), x, seed)
    made(gm, deduplicate_quantizers)
    (together,) = torch.autograd.grad(gm(x), x, seed)
    # factor * (a + b) against factor * a + factor * b: three roundings of fp64 each.
    torch.testing.assert_close(
        together, apart, rtol=0, atol=8 * torch.finfo(torch.float64).eps * float(apart.abs().max() + 1)
    )
