"""edges: the first convolutions and the last linear layers."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from octav_fx.ir.dataflow import tensor_flow
from octav_fx.ir.edits import site_of
from octav_fx.ir.first_last import first_and_last_layers
from octav_fx.passes import canonicalize
from tests.support.graphs import captured, model


def edges(forward: Any, x: torch.Tensor, **parts: nn.Module) -> set[str]:
    gm = captured(model(forward, **parts), x=x)
    canonicalize(gm)
    return {site_of(node) for node in first_and_last_layers(tensor_flow(gm.graph))}


IMAGE, ROWS = torch.randn(1, 2, 6, 6), torch.randn(3, 4)


def conv() -> nn.Conv2d:
    return nn.Conv2d(2, 2, 3, padding=1)


def test_the_first_convolution_and_the_last_linear_layer() -> None:
    parts = {"a": conv(), "b": conv(), "c": nn.Linear(72, 4), "d": nn.Linear(4, 2)}
    assert edges(lambda s, x: s.d(s.c(s.b(s.a(x).relu()).flatten(1))), IMAGE, **parts) == {"a", "d"}


def test_every_first_and_every_last_one() -> None:
    parts = {"a": conv(), "b": conv(), "c": nn.Linear(6, 4), "d": nn.Linear(6, 2)}
    assert edges(lambda s, x: (s.c(y := s.a(x) + s.b(x)), s.d(y)), IMAGE, **parts) == {"a", "b", "c", "d"}


def test_a_linear_layer_before_keeps_a_convolution_from_being_first() -> None:
    parts = {"a": nn.Linear(6, 6), "b": conv()}
    assert edges(lambda s, x: s.b(s.a(x)), IMAGE, **parts) == set()


def test_a_matmul_after_keeps_a_linear_layer_from_being_last() -> None:
    assert edges(lambda s, x: s.a(x) @ x.t(), ROWS, a=nn.Linear(4, 4)) == set()


def test_a_layer_alone_is_an_edge() -> None:
    assert edges(lambda s, x: s.a(x), ROWS, a=nn.Linear(4, 4)) == {"a"}


def test_a_shape_of_a_linear_output_does_not_make_it_feed_another() -> None:
    parts = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    found = edges(lambda s, x: (y := s.a(x), s.b(x).view(y.shape[0], -1)), ROWS, **parts)
    assert found == {"a", "b"}


def test_functional_and_transposed_layers_count() -> None:
    up = nn.ConvTranspose2d(2, 2, 2)
    assert edges(lambda s, x: F.linear(s.up(x), s.fc.weight), IMAGE, up=up, fc=nn.Linear(7, 3)) == {"up", "fc"}
