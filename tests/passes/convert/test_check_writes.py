"""check_writes: what is written in place is seen wherever the model's own memory shows it, or an error says so."""

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_fx import Config, OctavError, calibrate, convert, freeze, quantize
from tests.support.graphs import model

pytestmark = pytest.mark.usefixtures("as_with_vnni")

X = torch.randn(2, 3, 5, 5)


def frozen(forward, residual_bits):
    torch.manual_seed(0)
    net = model(forward, **{name: nn.Conv2d(3, 3, 1) for name in "abc"}).eval()
    q = quantize(net, X, Config(8, 8, edge_bits=None, residual_bits=residual_bits))
    return net, freeze(calibrate(q, [X]))


SEEN = {
    "a sum": lambda s, x: ((y := s.a(x))[:, :2], s.b(operator.iadd(y, s.c(x)))),
    "a function": lambda s, x: ((y := s.a(x))[:, :2], s.b(F.silu(y, inplace=True))),
    "a clamp": lambda s, x: ((y := s.a(x)).permute(0, 2, 3, 1), s.b(y.relu_())),
    "a copy of what was written": lambda s, x: s.b(y := s.a(x).relu_()).flatten(1) + y.flatten(1),
    "read before": lambda s, x: (s.a(x).relu_().flatten(1).mean(), s.b(F.relu(s.c(x), inplace=True))),
}


@pytest.mark.parametrize("residual_bits", [None, 8])
@pytest.mark.parametrize("forward", SEEN.values(), ids=list(SEEN))
def test_a_write_is_seen(forward, residual_bits):
    net, q = frozen(forward, residual_bits)
    for run in (q, convert(q), convert(q, integers=False)):
        for found, expected in zip(run(X), net(X), strict=True):
            # 8 bits are within a twentieth of the range; without the write, values differ by much of it.
            assert float((found - expected).detach().abs().max() / expected.abs().max()) < 0.05


UNCLEAR = {
    "written where it lies": lambda s, x: ((y := s.a(x)).flatten(1), s.b(y.relu_())),
    "written in the view": lambda s, x: ((y := s.a(x)), y.reshape(2, -1)[:, :4].relu_(), s.b(y)),
    "written twice": lambda s, x: ((z := (y := s.a(x)).relu_().flatten(1)), s.b(y.add_(1)), z),
}


@pytest.mark.parametrize("forward", UNCLEAR.values(), ids=list(UNCLEAR))
def test_what_layouts_decide_is_refused(forward):
    _, q = frozen(forward, None)
    with pytest.raises(OctavError, match=r"writes into .* one layout of memory only"):
        convert(q)
    convert(q, integers=False)
