"""macs: multiply-accumulates by the formulas of the ops, on fake tensors."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from octav_fx.ir.macs import MacCounter
from octav_fx.ir.meta import info
from tests.support.graphs import captured, model

# forward, parts, shape of x, multiply-accumulates.
COUNTS: dict[str, tuple[Any, dict[str, Any], tuple[int, ...], int]] = {
    "linear": (lambda s, x: s.a(x), {"a": nn.Linear(5, 7)}, (2, 3, 5), 2 * 3 * 5 * 7),
    "matmul": (lambda s, x: x @ x.transpose(1, 2), {}, (2, 3, 5), 2 * 3 * 3 * 5),
    "conv2d": (lambda s, x: s.a(x), {"a": nn.Conv2d(4, 6, 3, padding=1)}, (2, 4, 5, 5), 2 * 25 * 6 * 4 * 9),
    "grouped": (lambda s, x: s.a(x), {"a": nn.Conv2d(4, 8, 3, padding=1, groups=4)}, (2, 4, 5, 5), 2 * 25 * 8 * 9),
    "strided": (lambda s, x: s.a(x), {"a": nn.Conv1d(4, 6, 3, stride=2)}, (2, 4, 9), 2 * 4 * 6 * 4 * 3),
    # Each input value meets each value of the kernel.
    "transposed": (lambda s, x: s.a(x), {"a": nn.ConvTranspose1d(4, 6, 3)}, (2, 4, 5), 2 * 5 * 4 * 6 * 3),
    "baddbmm": (lambda s, x: torch.baddbmm(x, x, x), {}, (2, 3, 3), 2 * 27),
    "einsum": (lambda s, x: torch.einsum("bij,bkj->bik", x, x), {}, (2, 3, 5), 2 * 3 * 3 * 5),
    # Scores and values.
    "attention": (lambda s, x: F.scaled_dot_product_attention(x, x, x), {}, (2, 3, 5, 4), 2 * 2 * 3 * 5 * 5 * 4),
    "elementwise": (lambda s, x: (x * x + x).relu().sum(), {}, (2, 3), 0),
    "norm": (lambda s, x: s.a(x), {"a": nn.LayerNorm(3)}, (2, 3), 0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    forward, parts, shape, macs = COUNTS[name]
    gm = captured(model(forward, **parts), x=torch.randn(shape))
    assert sum(info(node).macs for node in gm.graph.nodes) == macs


def test_a_counter_counts_what_runs_inside() -> None:
    x = torch.randn(3, 4)
    with MacCounter() as counter:
        x @ x.t()
    x @ x.t()
    assert counter.macs == 36


def test_a_bilinear_layer() -> None:
    layer = nn.Bilinear(4, 5, 6)
    with MacCounter() as counter:
        layer(torch.randn(2, 3, 4), torch.randn(2, 3, 5))
    assert counter.macs == 2 * 3 * 4 * 5 * 6


# Each: the layer, its input, and the multiply-accumulates of all its steps and directions.
RECURRENT: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    # Four gates, each from 4 inputs and from 3 outputs before.
    "LSTM": (nn.LSTM(4, 3), (5, 2, 4), 5 * 2 * 4 * 3 * (4 + 3)),
    "two layers, both ways": (
        nn.LSTM(4, 3, 2, bidirectional=True),
        (5, 2, 4),
        5 * 2 * 2 * 4 * 3 * ((4 + 3) + (6 + 3)),
    ),
    "batch first, without a bias": (nn.LSTM(4, 3, batch_first=True, bias=False), (2, 5, 4), 5 * 2 * 4 * 3 * 7),
    # Its outputs go through a matrix of 2 x 3.
    "projected": (nn.LSTM(4, 3, proj_size=2), (5, 2, 4), 5 * 2 * (4 * 3 * (4 + 2) + 3 * 2)),
    "GRU": (nn.GRU(4, 3), (5, 2, 4), 5 * 2 * 3 * 3 * (4 + 3)),
    "RNN": (nn.RNN(4, 3), (5, 2, 4), 5 * 2 * 3 * (4 + 3)),
    "LSTM cell": (nn.LSTMCell(4, 3), (2, 4), 2 * 4 * 3 * (4 + 3)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_on_data_and_in_a_capture(name: str, training: bool) -> None:
    layer, shape, macs = RECURRENT[name]
    layer.train(training)
    with MacCounter() as counter:
        layer(torch.randn(shape))
    assert counter.macs == macs
    with MacCounter() as counter, torch.no_grad():
        layer(torch.randn(shape))
    assert counter.macs == macs
    gm = captured(model(lambda s, x: s.a(x)[0], a=layer), x=torch.randn(shape))
    assert sum(info(node).macs for node in gm.graph.nodes) == macs


def test_rows_sorted_by_expert_meet_one_expert_each() -> None:
    x, weights = torch.randn(6, 4), torch.randn(3, 4, 8)
    ends = torch.tensor([1, 5, 6], dtype=torch.int32)
    with MacCounter() as counter:
        F.grouped_mm(x, weights, offs=ends)
    assert counter.macs == 6 * 4 * 8
    with MacCounter() as counter:
        F.grouped_mm(x.view(3, 2, 4), weights)
    assert counter.macs == 6 * 4 * 8
