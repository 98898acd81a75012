"""Functions of einops are traced through: axes of the input stay free, and what they multiply is quantized."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from tests.support.alike import quantized_alike
from tests.support.graphs import model

einops = pytest.importorskip("einops")


def attention(s: Any, x: Tensor) -> Tensor:
    q, k, v = (einops.rearrange(t, "b n (h d) -> b h n d", h=2) for t in (s.fc(x), x, x))
    return einops.rearrange((q @ k.transpose(-1, -2)).softmax(-1) @ v, "b h n d -> b n (h d)")


def packed(s: Any, x: Tensor) -> Tensor:
    both, shapes = einops.pack([s.fc(x), x], "b * d")
    first, second = einops.unpack(both, shapes, "b * d")
    return first * second


CALLS: dict[str, Callable[..., Any]] = {
    "rearrange": lambda s, x: einops.rearrange(s.fc(x), "b n (h d) -> (b h) n d", h=4),
    "of a list": lambda s, x: einops.rearrange([s.fc(x), x], "k b n d -> b n (k d)"),
    "repeat": lambda s, x: einops.repeat(s.fc(x), "b n d -> b (n r) d", r=2),
    "reduce": lambda s, x: einops.reduce(s.fc(x), "b n d -> b d", "mean"),
    "parse_shape": lambda s, x: einops.repeat(s.fc(x)[:, 0], "b d -> b n d", **einops.parse_shape(x, "_ n _")),
    "einsum": lambda s, x: einops.einsum(s.fc(x), s.fc.weight, "b n d, e d -> b n e"),
    "attention": attention,
    "pack": packed,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    q = quantized_alike(model(CALLS[name], fc=nn.Linear(8, 8)), (torch.randn(2, 5, 8),), (torch.randn(3, 7, 8),))
    assert octav_fx.coverage(q).skipped == []
