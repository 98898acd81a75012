"""quantizers_behind_moves: a layer's operand is quantized where the layer reads it, on the grid that it has."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_fx import Config, calibrate, convert, export_onnx, freeze, quantize
from octav_fx.deploy.convert import rewritten
from octav_fx.deploy.runtimes import run_onnx
from octav_fx.ir.printer import graph_text
from octav_fx.passes import pack_weights, quantizers_behind_moves
from tests.support.graphs import model
from tests.support.passes import made

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def branches(self, x):
    y = self.one(x).relu()
    z = F.max_pool2d(y, 3, 1, 1)
    return self.two(y) + self.three(z) + self.four(z)


def frozen(forward, **options):
    torch.manual_seed(0)
    parts = {name: nn.Conv2d(3 if name == "one" else 4, 4, 1) for name in ("one", "two", "three", "four")}
    config = Config(**{"edge_bits": None, "residual_bits": 8, **options})
    return freeze(calibrate(quantize(model(forward, **parts).eval(), X, config), [X]))


def test_what_layers_read_behind_a_pool():
    c = rewritten(frozen(branches), (pack_weights,))
    expected = c(X)
    assert [(e.node, e.detail) for e in made(c, quantizers_behind_moves)] == [
        ("quantizers.two_input", "max_pool2d once more")
    ]
    text = graph_text(c.graph)
    assert "max_pool2d = max_pool2d(quantizers_two_input, 3, " in text
    # One for all that read the same value.
    assert "\nquantizers_two_input_0 = self.quantizers.two_input_0(max_pool2d)\n" in text
    assert "three = conv2d(quantizers_two_input_0, " in text
    assert "four = conv2d(quantizers_two_input_0, " in text
    assert torch.equal(c(X), expected)
    assert made(c, quantizers_behind_moves) == []


@pytest.mark.slow
def test_layers_in_integers_have_nothing_more_to_do(tmp_path):
    with torch.no_grad():
        q = frozen(branches)
        expected, path = q(X), tmp_path / "model.onnx"
        assert torch.equal(convert(q, integers=False)(X), expected)
        assert "lookup" not in graph_text(convert(q).graph)
        # Sums of four products, in another order.
        atol = 8 * torch.finfo(torch.float32).eps * float(expected.abs().max())
        torch.testing.assert_close(convert(q)(X), expected, rtol=0, atol=atol)
        export_onnx(q, X, path)
        (found,) = run_onnx(path, X).values()
        assert torch.equal(found, expected)


LEFT = {
    "each has its own": lambda s, x: s.two(y := s.one(x)) + s.three(F.max_pool2d(y, 1)),
    # What is read is no level any more.
    "written into": lambda s, x: (z := F.max_pool2d(s.one(x), 1), z.add_(1), s.two(z))[-1],
    "computed": lambda s, x: s.two(y := s.one(x)) + s.three(2 * F.max_pool2d(y, 1)),
}


@pytest.mark.parametrize("forward", LEFT.values(), ids=list(LEFT))
def test_what_is_left_alone(forward):
    c = rewritten(frozen(forward, residual_bits=None), (pack_weights,))
    assert made(c, quantizers_behind_moves) == []
