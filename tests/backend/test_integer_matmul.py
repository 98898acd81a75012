"""Layers whose matmuls are integer compute compiled what they do eagerly; on a GPU, where there is one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx.backend import entry
from octav_fx.ir.edits import Edit
from octav_fx.ir.pipeline import run
from octav_fx.ops import matmuls
from tests.support.interpreter import DEVICE
from tests.support.matmuls import ON_DEVICE


class Layers(nn.Module):
    """Beside each other, not in a row: a last bit that moves a value to the next code would move all that follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 1)
        self.strided = nn.Conv2d(16, 48, 1, stride=2, bias=False)
        self.linear = nn.Linear(64, 40)
        self.bare = nn.Linear(64, 24, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        images, rows = x.relu(), x.flatten(1).sin()
        return self.conv(images), self.strided(images), self.linear(rows), self.bare(rows)


@pytest.mark.compile
def test_compiled_as_it_is_eagerly(monkeypatch: Any) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(matmuls, "MATMULS", (ON_DEVICE,))
    done: list[Edit] = []
    monkeypatch.setattr(entry, "run", lambda gm, passes: done.extend(run(gm, passes)))
    x = torch.randn(9, 16, 2, 2, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_()
    q = octav_fx.quantize(Layers().to(DEVICE), x)
    # What is forced is no part of what Inductor's cache is keyed with.
    with torch._inductor.config.patch(force_disable_caches=True):
        y, expected = torch.compile(q, backend="octav")(x), q(x)
        parameters = [x, *q.parameters()]
        y += torch.autograd.grad(sum(z.square().sum() for z in y), parameters)
    assert [edit.verb for edit in done].count("integer matmul") == 4
    expected += torch.autograd.grad(sum(z.square().sum() for z in expected), parameters)
    # A wrong code would be off by a step, which is above 0.01 everywhere.
    for value, other in zip(y, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4)


@pytest.mark.compile
def test_inference_compiled_as_it_is_eagerly(monkeypatch: Any) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(matmuls, "MATMULS", (ON_DEVICE,))
    done: list[Edit] = []
    monkeypatch.setattr(entry, "run", lambda gm, passes: done.extend(run(gm, passes)))
    x = torch.randn(9, 16, 2, 2, device=DEVICE).to(memory_format=torch.channels_last)
    q = octav_fx.quantize(Layers().to(DEVICE).eval(), x)
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        y, expected = torch.compile(q, backend="octav")(x), q(x)
    assert [edit.verb for edit in done].count("integer matmul") == 4
    for value, other in zip(y, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4)
