"""saturate_codes: a clamp before a quantizer is where its codes end."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_fx.deploy.convert import rewritten
from octav_fx.ir.printer import graph_text
from octav_fx.passes import CONVERT, saturate_codes
from tests.support.deployable import frozen
from tests.support.graphs import model
from tests.support.passes import made


def converted(float_module: nn.Module, x: torch.Tensor) -> nn.Module:
    return rewritten(frozen(float_module, x), CONVERT[: CONVERT.index(saturate_codes)])


@pytest.mark.parametrize(
    ("clamp", "ends"),
    [
        # Unsigned grids: zero is their own end.
        *((nn.ReLU(), (None, None)), (nn.ReLU6(), (None, 6.0)), (nn.Hardtanh(0.0, 0.5), (None, 0.5))),
        *((nn.Hardtanh(), (-1.0, 1.0)), (nn.Hardtanh(-0.3, 0.4), (-0.3, 0.4)), (nn.Hardtanh(0.1, 0.4), (0.1, 0.4))),
    ],
)
@pytest.mark.parametrize("between", [(), (nn.MaxPool2d(2), nn.Flatten())])
def test_modules(clamp, ends, between):
    x = torch.randn(2, 3, 8, 8)
    layers = [nn.Conv2d(3, 4, 3), clamp, *between, nn.Linear(36 if between else 6, 5)]
    c = converted(nn.Sequential(*layers), x)
    before = copy.deepcopy(c)
    assert len(made(c, saturate_codes)) == 1
    assert "self.1(" not in graph_text(c.graph)
    (quantizer,) = (q for name, q in c.named_modules() if name.endswith(f"{len(layers) - 1}_input"))
    assert (quantizer.floor, quantizer.ceiling) == ends or not quantizer.signed
    # Inside and outside of every range, and of the clip.
    for scale in (0.1, 1, 100):
        assert torch.equal(c(scale * x), before(scale * x))
    assert made(c, saturate_codes) == []


def test_calls_and_the_narrower_of_two():
    def forward(self, x):
        y = torch.clamp(F.hardtanh(self.conv(x), -2.0, 0.75), max=1.0)
        return self.last(y.clamp(-0.25, 0.5))

    x = torch.randn(2, 3, 8, 8)
    c = converted(model(forward, conv=nn.Conv2d(3, 4, 3), last=nn.Conv2d(4, 2, 1)), x)
    before = copy.deepcopy(c)
    assert len(made(c, saturate_codes)) == 3
    assert (
        graph_text(c.graph)
        == """\
conv_bias = self.conv.bias
quantizers_conv_input = self.quantizers.conv_input(x)
quantizers_conv_weight = self.quantizers.conv_weight()
conv = conv2d(quantizers_conv_input, quantizers_conv_weight, conv_bias, (1, 1), (0, 0), (1, 1), 1)
last_bias = self.last.bias
quantizers_last_input = self.quantizers.last_input(conv)
quantizers_last_weight = self.quantizers.last_weight()
last = conv2d(quantizers_last_input, quantizers_last_weight, last_bias, (1, 1), (0, 0), (1, 1), 1)
return last"""
    )
    quantizer = c.get_submodule("quantizers.last_input")
    assert (quantizer.floor, quantizer.ceiling) == (-0.25, 0.5)
    assert torch.equal(c(10 * x), before(10 * x))


def test_what_stays():
    def forward(self, x):
        # Read twice; by a tensor; of ranges apart; and written in place beside another reader.
        y = self.conv(x).relu()
        z = torch.clamp(self.conv(x), max=x.abs().mean())
        w = self.conv(x).clamp(1.0, 2.0).clamp(-2.0, 0.0)
        v = self.conv(x)
        u = v.relu_()
        return self.last(y) + y, self.last(z), self.last(w), self.last(u) + v

    x = torch.randn(2, 3, 8, 8)
    c = converted(model(forward, conv=nn.Conv2d(3, 4, 3), last=nn.Conv2d(4, 4, 1)), x)
    before = copy.deepcopy(c)
    edits = made(c, saturate_codes)
    assert len(edits) <= 1
    for found, expected in zip(c(x), before(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("clamp", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0.1, 0.4)])
@pytest.mark.parametrize("pad", [nn.ZeroPad2d((0, 1, 0, 1)), nn.ConstantPad2d(1, 0.0), nn.ConstantPad2d(1, 0.5)])
def test_zeros_around_what_is_clamped(clamp, pad):
    x = torch.randn(2, 3, 8, 8)
    c = converted(nn.Sequential(nn.Conv2d(3, 4, 3), clamp, pad, nn.Conv2d(4, 2, 3)), x)
    before = copy.deepcopy(c)
    # A zero that is not within the clamp would become its end.
    assert len(made(c, saturate_codes)) == (pad.value == 0 and type(clamp) is not nn.Hardtanh)
    for scale in (0.1, 1, 100):
        assert torch.equal(c(scale * x), before(scale * x))
