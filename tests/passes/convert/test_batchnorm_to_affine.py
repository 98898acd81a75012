"""batchnorm_to_affine: a batch norm in eval mode is one factor and one offset, to the last bit on a CPU."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_fx.ir.printer import graph_text
from octav_fx.nn import ChannelAffine
from octav_fx.passes import batchnorm_to_affine
from tests.support.deployable import trained
from tests.support.graphs import captured, model
from tests.support.passes import declined, made

FUSED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        *((nn.BatchNorm1d, (6, 5)), (nn.BatchNorm1d, (6, 5, 7))),
        *((nn.BatchNorm2d, (6, 5, 7, 3)), (nn.BatchNorm3d, (2, 5, 3, 4, 3))),
    ],
)
def test_modules(norm, shape):
    float_module, x = nn.Sequential(trained(norm(5)), nn.ReLU()).eval(), torch.randn(shape)
    before = copy.deepcopy(float_module)
    gm = captured(float_module, input=x)
    text = graph_text(gm.graph)
    assert [edit.node for edit in made(gm, batchnorm_to_affine)] == ["0"]
    assert graph_text(gm.graph) == text
    assert isinstance(gm.get_submodule("0"), ChannelAffine)
    if FUSED:
        assert torch.equal(gm(x), before(x))
    # Two roundings instead of one, of numbers below 30.
    torch.testing.assert_close(gm(x), before(x), rtol=0, atol=30 * 2**-23)
    assert made(gm, batchnorm_to_affine) == []


def test_calls():
    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var, None, self.beta, False, 0.1, 1e-3)

    parts = {"mean": torch.randn(4), "var": torch.rand(4) + 0.1, "beta": nn.Parameter(torch.randn(4))}
    float_module, x = model(forward, **parts), torch.randn(3, 4, 2)
    gm = captured(float_module, x=x)
    assert len(made(gm, batchnorm_to_affine)) == 1
    assert graph_text(gm.graph) == "folded_batch_norm = self.folded.batch_norm(x)\nreturn folded_batch_norm"
    torch.testing.assert_close(gm(x), float_module(x), rtol=0, atol=30 * 2**-23)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.BatchNorm1d(4, track_running_stats=False), "not folded: it keeps no running statistics"),
        (nn.BatchNorm1d(4).half(), "not folded: statistics in half precision"),
    ],
)
def test_what_stays(norm, reason):
    x = torch.randn(3, 4, dtype=norm.weight.dtype)
    gm = captured(nn.Sequential(norm).eval(), input=x)
    assert declined(gm, batchnorm_to_affine) == [("0", None, reason)]


def test_training_mode_stays():
    gm = captured(nn.Sequential(nn.BatchNorm1d(4)).train(), input=torch.randn(3, 4))
    assert declined(gm, batchnorm_to_affine) == [("0", None, "not folded: training mode")]


def test_statistics_that_are_computed_stay():
    forward = lambda self, x: F.batch_norm(x, self.mean, self.var + x.mean())  # noqa: E731
    gm = captured(model(forward, mean=torch.zeros(4), var=torch.ones(4)), x=torch.randn(3, 4))
    assert declined(gm, batchnorm_to_affine) == [
        ("batch_norm", None, "not folded: its statistics or its scale are computed in the model")
    ]
