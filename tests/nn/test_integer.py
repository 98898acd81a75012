"""What integer graphs call: tensors that are no batches of images, too."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_fx import Config, calibrate, convert, freeze, quantize
from octav_fx.deploy.convert import integer_layers
from tests.support.deployable_models import relative
from tests.support.graphs import model


@pytest.mark.parametrize(
    ("forward", "x"),
    [
        (lambda s, x: s.head(F.adaptive_avg_pool2d(s.a(x).relu(), 1).flatten()), torch.randn(3, 8, 8)),
        (lambda s, x: s.head(s.a(x).mean((-2, -1))), torch.randn(3, 8, 8)),
        (lambda s, x: s.b(F.max_pool2d(s.a(x).relu(), 2) + F.max_pool2d(s.a(x), 2)), torch.randn(3, 8, 8)),
        (lambda s, x: s.c(s.c(x).relu()), torch.randn(4, 9)),
        # A mean over two axes of five is none over positions.
        (lambda s, x: s.head(s.a(x.flatten(0, 1)).unflatten(0, (2, 3)).mean((-2, -1))), torch.randn(2, 3, 3, 8, 8)),
        (lambda s, x: s.wide(s.a(x)[:, None].mean((2, 3))), torch.randn(2, 3, 8, 8)),
    ],
)
def test_other_axes_than_those_of_images(forward, x):
    torch.manual_seed(0)
    parts = {"a": nn.Conv2d(3, 4, 3, padding=1), "b": nn.Conv2d(4, 2, 3), "c": nn.Conv1d(4, 4, 3)}
    net = model(forward, **parts, head=nn.Linear(4, 2), wide=nn.Linear(8, 2)).eval()
    q = freeze(calibrate(quantize(net, x, Config(4, 8, edge_bits=4, residual_bits=8)), [x]))
    c = convert(q)
    assert all(reason is None for _, reason in integer_layers(c))
    with torch.no_grad():
        assert torch.equal(convert(q, integers=False)(x), q(x))
        # oneDNN rounds in another order: no code of so few is at a tie.
        assert relative(c(x), q(x)) < 1e-6
        assert relative(q(x), net(x)) < 0.5
