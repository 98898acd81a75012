"""views_as_reshapes: integer layers return channels last, and a view of that may have to be a copy."""

import pytest
import torch
from torch import nn

from octav_fx import Config, calibrate, convert, freeze, quantize
from octav_fx.deploy.convert import rewritten
from octav_fx.ir.printer import graph_text
from octav_fx.passes import CONVERT, views_as_reshapes
from tests.support.deployable_models import relative
from tests.support.graphs import model
from tests.support.passes import made

pytestmark = pytest.mark.usefixtures("as_with_vnni")

X = torch.randn(2, 3, 5, 5)


def frozen(forward, **parts: nn.Module):
    torch.manual_seed(0)
    net = model(forward, a=nn.Conv2d(3, 4, 3), b=nn.Linear(36, 5), **parts).eval()
    q = quantize(net, X, Config(8, 8, edge_bits=None))
    return freeze(calibrate(q, [X]))


VIEWS = {
    "of images": lambda s, x: s.b(s.a(x).relu().view(x.size(0), -1)),
    "of everything": lambda s, x: s.a(x).view(-1),
    "as another tensor": lambda s, x: s.a(x).view_as(torch.empty(2, 36)),
    "of rows": lambda s, x: s.a(x).view(x.size(0), 4, -1),
    "of channels last": lambda s, x: s.a(x.to(memory_format=torch.channels_last)).permute(0, 2, 3, 1).view(-1, 4),
}


@pytest.mark.parametrize("forward", VIEWS.values(), ids=list(VIEWS))
def test_a_view_of_any_layout(forward):
    q = frozen(forward)
    expected = q(X).detach()
    assert torch.equal(convert(q, integers=False)(X), expected)
    # No code is at a tie: what is left is the order of two roundings.
    assert relative(convert(q)(X), expected) < 1e-6


STAY = {
    "written into": lambda s, x: ((y := s.a(x)), y.view(2, 4, 9).relu_(), y)[2],
    "written before": lambda s, x: s.a(x).relu_().view(2, 4, 9),
    "of bits": lambda s, x: s.a(x).view(torch.int32),
    "of bits that the graph names": lambda s, x: s.a(x).view(torch.empty(1, dtype=torch.int32, device=x.device).dtype),
}


@pytest.mark.parametrize("forward", STAY.values(), ids=list(STAY))
def test_what_stays_a_view(forward):
    q = frozen(forward)
    before = rewritten(q, CONVERT[: CONVERT.index(views_as_reshapes)])
    assert made(before, views_as_reshapes) == [] and ".view(" in graph_text(before.graph)
    assert torch.equal(convert(q, integers=False)(X), q(X))
