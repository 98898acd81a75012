"""fold_batchnorm: an eval-mode batch norm moves into the layer before it, up to rounding; else it says why not."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octav_fx.capture.modules import QuantizedModule
from octav_fx.ir.printer import graph_text
from octav_fx.passes import canonicalize, fold_batchnorm
from tests.support.graphs import captured, model, parameter
from tests.support.passes import declined, made

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def trained(float_module: nn.Module) -> nn.Module:
    """Eval mode with statistics and factors as after training: of both signs, one of them zero."""
    for norm in float_module.modules():
        if isinstance(norm, NORMS):
            if norm.running_var is not None:
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.2, 3)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
                norm.weight.data[0], norm.weight.data[1] = -1.5, 0.0
    return float_module.eval()


def canonical(float_module: nn.Module, **arguments: Any) -> QuantizedModule:
    gm = captured(float_module, **arguments)
    made(gm, canonicalize)
    return gm


def rounding(layer: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """How far folded and unfolded may be apart in fp32, elementwise.

    Each is a sum of n products, times scale, plus beta: (n + 8) roundings, of at most eps / 2 times the same sum of
    magnitudes each (Higham, Accuracy and Stability, section 3.1). Twice that, as both sides round.
    """
    with torch.no_grad():
        layer, norm = copy.deepcopy(layer).double(), copy.deepcopy(norm).double()
        offset = norm.running_mean.abs() + (0 if layer.bias is None else layer.bias.abs())
        layer.weight.copy_(layer.weight.abs())
        norm.running_mean.zero_()
        if norm.affine:
            norm.weight.copy_(norm.weight.abs())
            norm.bias.copy_(norm.bias.abs())
        layer.bias = nn.Parameter(offset)
        magnitude = norm(layer(x.double().abs()))
        products = layer.weight.numel() // layer.weight.shape[0]
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            products = layer.weight.numel() // layer.weight.shape[1]
    return (products + 8) * torch.finfo(torch.float32).eps * magnitude


PAIRS = {
    "conv1d": (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (2, 3, 8)),
    "conv2d": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), (2, 3, 6, 6)),
    "conv3d": (nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), (2, 3, 4, 4, 4)),
    "no bias": (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), (2, 3, 6, 6)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (2, 4, 6, 6)),
    "reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), (2, 3, 6, 6)),
    "affine=False": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), (2, 3, 6, 6)),
    "no bias, affine=False": (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), (2, 3, 6, 6)),
    "eps": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.1), (2, 3, 6, 6)),
    "linear": (nn.Linear(5, 4), nn.BatchNorm1d(4), (6, 5)),
    "linear, no bias": (nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), (6, 5)),
    "conv_transpose1d": (nn.ConvTranspose1d(3, 4, 3, stride=2), nn.BatchNorm1d(4), (2, 3, 5)),
    "conv_transpose2d": (nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), nn.BatchNorm2d(4), (2, 3, 5, 5)),
    "conv_transpose3d": (nn.ConvTranspose3d(3, 4, 2, bias=False), nn.BatchNorm3d(4), (2, 3, 3, 3, 3)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_folded_computes_what_the_two_layers_compute_up_to_rounding(name: str) -> None:
    layer, norm, shape = copy.deepcopy(PAIRS[name])
    float_module, x = trained(nn.Sequential(layer, norm)), torch.randn(shape)
    gm = canonical(float_module, input=x)
    state = {key: value.clone() for key, value in float_module.state_dict().items()}
    assert [(edit.node, edit.verb, edit.detail) for edit in made(gm, fold_batchnorm)] == [("0", "fold", "1")]

    assert not any(node.op == "call_module" for node in gm.graph.nodes)
    expected = float_module(x)
    assert ((gm(x) - expected).abs() <= rounding(layer, norm, x)).all()
    # Where gamma is zero, beta is all that is left, to the bit.
    if norm.affine:
        assert torch.equal(gm(x)[:, 1], expected[:, 1])
    assert list(gm.state_dict()) == list(state)
    assert all(torch.equal(gm.state_dict()[key], value) for key, value in state.items())
    text = graph_text(gm.graph)
    assert made(gm, fold_batchnorm) == [] and graph_text(gm.graph) == text


def test_golden() -> None:
    float_module = trained(
        model(lambda self, x: self.bn(self.conv(x)).relu(), conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    )
    gm = canonical(float_module, x=torch.randn(2, 3, 6, 6))
    assert graph_text(gm.graph) == (
        "conv_weight = self.conv.weight\n"
        "conv_bias = self.conv.bias\n"
        "conv = conv2d(x, conv_weight, conv_bias, (1, 1), (0, 0), (1, 1), 1)\n"
        "bn = self.bn(conv)\n"
        "relu = bn.relu()\n"
        "return relu"
    )
    made(gm, fold_batchnorm)
    assert graph_text(gm.graph) == (
        "conv_weight = self.conv.weight\n"
        "conv_bias = self.conv.bias\n"
        "bn_weight = self.bn.weight\n"
        "bn_bias = self.bn.bias\n"
        "bn_running_mean = self.bn.running_mean\n"
        "bn_running_var = self.bn.running_var\n"
        "folded_weight = folded_weight(conv_weight, bn_weight, bn_running_var, 1e-05, 0)\n"
        "folded_bias = folded_bias(conv_bias, bn_running_mean, bn_running_var, bn_weight, bn_bias, 1e-05)\n"
        "conv = conv2d(x, folded_weight, folded_bias, (1, 1), (0, 0), (1, 1), 1)\n"
        "relu = conv.relu()\n"
        "return relu"
    )


def test_a_shared_convolution_is_folded_differently_at_each_call() -> None:
    def forward(self, x):
        return self.one(self.conv(x)), self.two(self.conv(x))

    conv, one, two = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    float_module, x = trained(model(forward, conv=conv, one=one, two=two)), torch.randn(2, 3, 6, 6)
    gm = canonical(float_module, x=x)
    assert [(edit.node, edit.detail) for edit in made(gm, fold_batchnorm)] == [("conv", "one"), ("conv:1", "two")]
    for found, expected, norm in zip(gm(x), float_module(x), (one, two), strict=True):
        assert ((found - expected).abs() <= rounding(conv, norm, x)).all()


def test_a_shared_batch_norm_is_folded_into_each_layer_before_it() -> None:
    first, second, norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    float_module = trained(model(lambda self, x: (self.bn(self.a(x)), self.bn(self.b(x))), a=first, b=second, bn=norm))
    x = torch.randn(2, 3, 6, 6)
    gm = canonical(float_module, x=x)
    assert len(made(gm, fold_batchnorm)) == 2
    for found, expected, conv in zip(gm(x), float_module(x), (first, second), strict=True):
        assert ((found - expected).abs() <= rounding(conv, norm, x)).all()


def test_gradients_reach_weight_bias_gamma_and_beta() -> None:
    layer, norm = nn.Conv2d(3, 4, 3).double(), nn.BatchNorm2d(4).double()
    float_module, x = trained(nn.Sequential(layer, norm)), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    gm = canonical(float_module, input=x)
    made(gm, fold_batchnorm)
    parameters = list(float_module.parameters())
    seed = torch.randn_like(gm(x))
    folded = torch.autograd.grad(gm(x), parameters, seed)
    unfolded = torch.autograd.grad(float_module(x), parameters, seed)
    for (name, _), a, b in zip(float_module.named_parameters(), folded, unfolded, strict=True):
        # Sums of at most 2 * 4 * 4 * 27 terms in fp64, in two orders.
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=name)
        assert a.abs().sum() > 0


REFUSALS = {
    "no layer before it": (
        model(lambda self, x: self.bn(self.conv(x).relu()), conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)),
        "not folded: its input relu is not a convolution or linear layer",
    ),
    "first in the model": (
        model(lambda self, x: self.bn(x), bn=nn.BatchNorm2d(3)),
        "not folded: its input x is not a convolution or linear layer",
    ),
    "after a matmul": (
        model(lambda self, x: self.bn(x @ self.weight), bn=nn.BatchNorm2d(3), weight=parameter(6, 6)),
        "not folded: its input matmul is not a convolution or linear layer",
    ),
    "no running statistics": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        "not folded: it keeps no running statistics",
    ),
    "another reader": (
        model(lambda self, x: self.bn(y := self.conv(x)) + y, conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)),
        "not folded: conv has other readers",
    ),
    "read by the output": (
        model(lambda self, x: (self.bn(y := self.conv(x)), y), conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)),
        "not folded: conv has other readers",
    ),
    "grouped and transposed": (
        nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)),
        "not folded: 0 is a grouped transposed convolution",
    ),
    "linear on a sequence": (
        nn.Sequential(nn.Linear(6, 6), nn.Flatten(1, 2), nn.Linear(6, 5), nn.BatchNorm1d(18)),
        "not folded: 2 does not have its channels in dimension 1, shape (2, 18, 5)",
    ),
    "functional, of torch": (
        model(
            lambda self, x: torch.batch_norm(
                self.conv(x), self.mean, self.var, self.mean, self.var, False, 0.1, 1e-5, False
            ),
            conv=nn.Conv2d(3, 4, 3),
            mean=torch.zeros(4),
            var=torch.ones(4),
        ),
        "not folded: torch.batch_norm takes its arguments in another order than F.batch_norm",
    ),
    "functional, training": (
        model(
            lambda self, x: F.batch_norm(self.conv(x), self.mean, self.var, training=True),
            conv=nn.Conv2d(3, 4, 3),
            mean=torch.zeros(4),
            var=torch.ones(4),
        ),
        "not folded: training mode",
    ),
    "functional, no statistics": (
        model(lambda self, x: F.batch_norm(self.conv(x), None, None, training=True), conv=nn.Conv2d(3, 4, 3)),
        "not folded: training mode",
    ),
    "functional, statistics computed": (
        model(
            lambda self, x: F.batch_norm(self.conv(x), self.mean, self.var.abs()),
            conv=nn.Conv2d(3, 4, 3),
            mean=torch.zeros(4),
            var=torch.ones(4),
        ),
        "not folded: its statistics or its scale are computed in the model",
    ),
    "functional, scale computed": (
        model(
            lambda self, x: F.batch_norm(self.conv(x), self.mean, self.var, weight=self.gain + 1),
            conv=nn.Conv2d(3, 4, 3),
            gain=parameter(4),
            mean=torch.zeros(4),
            var=torch.ones(4),
        ),
        "not folded: its statistics or its scale are computed in the model",
    ),
    "functional, first in the model": (
        model(
            lambda self, x: F.batch_norm(input=x, running_mean=self.mean, running_var=self.var),
            mean=torch.zeros(3),
            var=torch.ones(3),
        ),
        "not folded: its input x is not a convolution or linear layer",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_folded_stays_and_says_why(name: str) -> None:
    float_module, reason = REFUSALS[name]
    shape = (2, 4, 6, 6) if name.startswith("grouped") else (2, 3, 6, 6)
    arguments = {"input" if isinstance(float_module, nn.Sequential) else "x": torch.randn(shape)}
    gm = canonical(trained(float_module), **arguments)
    text = graph_text(gm.graph)
    assert [detail for _, _, detail in declined(gm, fold_batchnorm)] == [reason]
    assert graph_text(gm.graph) == text


def test_a_batch_norm_in_training_mode_stays() -> None:
    float_module = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    float_module[1].train()
    gm = canonical(float_module, input=torch.randn(2, 3, 6, 6))
    assert declined(gm, fold_batchnorm) == [("1", None, "not folded: training mode")]
    # The frozen one was folded.
    assert "self.1(" in graph_text(gm.graph) and "self.3(" not in graph_text(gm.graph)


@pytest.mark.parametrize(
    "register",
    [
        lambda norm: norm.register_forward_hook(lambda module, args, y: y * 2),
        lambda norm: norm.register_forward_pre_hook(lambda module, args: None),
    ],
    ids=["forward", "pre"],
)
def test_a_batch_norm_with_hooks_stays(register: Any) -> None:
    float_module, x = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), torch.randn(2, 3, 6, 6)
    register(float_module[1])
    gm = canonical(float_module, input=x)
    assert declined(gm, fold_batchnorm) == [("1", None, "not folded: the module has hooks")]
    assert torch.equal(gm(x), float_module(x))


def test_a_convolution_with_hooks_keeps_its_batch_norm() -> None:
    float_module, x = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), torch.randn(2, 3, 6, 6)
    float_module[0].register_forward_hook(lambda module, args, y: y * 2)
    gm = canonical(float_module, input=x)
    assert declined(gm, fold_batchnorm) == [
        ("1", None, "not folded: its input after_call is not a convolution or linear layer")
    ]
    assert torch.equal(gm(x), float_module(x))


# F.batch_norm in eval mode in the spellings that people write; "norm" says what is the same as a module.
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "positions": (lambda s, y: F.batch_norm(y, s.mean, s.var, s.gamma, s.beta, False, 0.1, s.eps), {}),
    "keywords": (
        lambda s, y: F.batch_norm(
            y, running_mean=s.mean, running_var=s.var, weight=s.gamma, bias=s.beta, training=False, eps=s.eps
        ),
        {},
    ),
    "input by keyword": (
        lambda s, y: F.batch_norm(
            eps=s.eps, bias=s.beta, weight=s.gamma, running_var=s.var, running_mean=s.mean, input=y
        ),
        {},
    ),
    "eps as it is": (lambda s, y: F.batch_norm(y, s.mean, s.var, s.gamma, s.beta), {"eps": 1e-5}),
    "weight=None": (lambda s, y: F.batch_norm(y, s.mean, s.var, None, s.beta, eps=s.eps), {"gamma": None}),
    "bias=None": (lambda s, y: F.batch_norm(y, s.mean, s.var, s.gamma, eps=s.eps), {"beta": None}),
    "neither": (lambda s, y: F.batch_norm(y, s.mean, s.var, eps=s.eps), {"gamma": None, "beta": None}),
}


def functional(name: str) -> tuple[nn.Module, nn.Conv2d, nn.BatchNorm2d]:
    """A convolution and a functional batch norm, and both as modules."""
    call, differs = CALLS[name]
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=differs.get("eps", 0.1))
    trained(nn.Sequential(conv, norm))
    parts: dict[str, Any] = {"gamma": norm.weight, "beta": norm.bias}
    float_module = model(
        lambda self, x: call(self, self.conv(x)),
        **{kind: part for kind, part in parts.items() if kind not in differs},
        conv=conv,
        mean=norm.running_mean,
        var=norm.running_var,
        eps=norm.eps,
    )
    if "gamma" in differs:
        norm.weight = nn.Parameter(torch.ones(4))
    if "beta" in differs:
        norm.bias = nn.Parameter(torch.zeros(4))
    return float_module, conv, norm


@pytest.mark.parametrize("name", CALLS)
def test_a_functional_batch_norm_in_eval_mode_is_folded(name: str) -> None:
    # gamma is negative for one channel and zero for another.
    float_module, conv, norm = functional(name)
    x = torch.randn(2, 3, 6, 6)
    gm = canonical(float_module, x=x)
    assert [(edit.node, edit.verb, edit.detail) for edit in made(gm, fold_batchnorm)] == [
        ("conv", "fold", "batch_norm")
    ]
    assert not any(node.target is F.batch_norm for node in gm.graph.nodes)
    expected = float_module(x)
    assert ((gm(x) - expected).abs() <= rounding(conv, norm, x)).all()
    if hasattr(float_module, "gamma"):
        assert torch.equal(gm(x)[:, 1], expected[:, 1])
    assert list(gm.state_dict()) == list(float_module.state_dict())
    text = graph_text(gm.graph)
    assert made(gm, fold_batchnorm) == [] and graph_text(gm.graph) == text


def test_golden_of_a_functional_batch_norm() -> None:
    float_module, _, _ = functional("keywords")
    gm = canonical(float_module, x=torch.randn(2, 3, 6, 6))
    made(gm, fold_batchnorm)
    assert graph_text(gm.graph) == (
        "conv_weight = self.conv.weight\n"
        "conv_bias = self.conv.bias\n"
        "gamma = self.gamma\n"
        "beta = self.beta\n"
        "mean = self.mean\n"
        "var = self.var\n"
        "folded_weight = folded_weight(conv_weight, gamma, var, 0.1, 0)\n"
        "folded_bias = folded_bias(conv_bias, mean, var, gamma, beta, 0.1)\n"
        "conv = conv2d(x, folded_weight, folded_bias, (1, 1), (0, 0), (1, 1), 1)\n"
        "return conv"
    )


def test_gradients_reach_the_parameters_of_a_functional_batch_norm() -> None:
    float_module, _, _ = functional("positions")
    float_module.double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    gm = canonical(float_module, x=x)
    made(gm, fold_batchnorm)
    parameters = list(float_module.parameters())
    seed = torch.randn_like(gm(x))
    folded = torch.autograd.grad(gm(x), parameters, seed)
    unfolded = torch.autograd.grad(float_module(x), parameters, seed)
    for a, b in zip(folded, unfolded, strict=True):
        # Sums of at most 2 * 4 * 4 * 27 terms in fp64, in two orders.
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        assert a.abs().sum() > 0


def test_state_that_several_functional_batch_norms_share_is_folded_at_each() -> None:
    def forward(self, x):
        gamma, var = self.gamma, self.var
        return F.batch_norm(self.a(x), self.mean, var, gamma), F.batch_norm(self.b(x), self.mean, var, gamma)

    first, second, norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    trained(nn.Sequential(norm))
    norm.bias = nn.Parameter(torch.zeros(4))
    float_module = model(forward, a=first, b=second, gamma=norm.weight, mean=norm.running_mean, var=norm.running_var)
    x = torch.randn(2, 3, 6, 6)
    gm = canonical(float_module, x=x)
    assert len(made(gm, fold_batchnorm)) == 2
    for found, expected, conv in zip(gm(x), float_module(x), (first, second), strict=True):
        assert ((found - expected).abs() <= rounding(conv, norm, x)).all()


def test_statistics_that_the_model_writes_before_they_are_read_are_not_folded() -> None:
    def forward(self, x):
        y = self.conv(x)
        self.mean.mul_(2)
        return F.batch_norm(y, self.mean, self.var)

    float_module = model(forward, conv=nn.Conv2d(3, 4, 3), mean=torch.ones(4), var=torch.ones(4))
    x = torch.randn(2, 3, 6, 6)
    gm = canonical(float_module, x=x)
    made(gm, fold_batchnorm)
    float_module.mean.fill_(1)
    expected = float_module(x)
    float_module.mean.fill_(1)
    # A mean that is 1 instead of 2 moves every value by 1.
    assert (gm(x) - expected).abs().max() < 0.5


@pytest.mark.parametrize(
    "call",
    [
        lambda s, x: F.conv2d(x, s.weight, bias=s.bias, padding=1),
        lambda s, x: F.conv2d(x, weight=s.weight, bias=s.bias, stride=1, padding=1),
        lambda s, x: F.conv2d(x, s.weight, s.bias, padding=1),
        # Its groups are those that a call without them has.
        lambda s, x: F.conv_transpose2d(x, s.weight.transpose(0, 1), bias=s.bias),
    ],
    ids=["bias by name", "all by name", "bias by position", "transposed, no groups"],
)
def test_a_functional_layer_is_folded_however_its_arguments_are_written(call: Any) -> None:
    norm, x = nn.BatchNorm2d(4), torch.randn(2, 3, 5, 5)
    float_module = trained(
        model(lambda s, x: s.norm(call(s, x)), weight=parameter(4, 3, 3, 3), bias=parameter(4), norm=norm)
    )
    gm = canonical(float_module, x=x)
    before = gm(x)
    assert len(made(gm, fold_batchnorm)) == 1
    # 27 products and the fold round to 2**-24 of sums below 100 each.
    torch.testing.assert_close(gm(x), before, rtol=0, atol=35 * 100 * 2**-23)
    assert made(gm, fold_batchnorm) == []
