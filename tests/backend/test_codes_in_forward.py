"""torch.compile(q, backend="octav", options={"integer": "auto"}): the same training as on levels."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx.backend import entry
from octav_fx.ir.edits import Edit
from octav_fx.ir.pipeline import run
from octav_fx.ops.product_of_codes import choice
from tests.support.integers import needs_onednn, needs_unsigned_bytes, needs_vnni

pytestmark = [pytest.mark.compile, needs_onednn, needs_unsigned_bytes]


class Net(nn.Module):
    """A convolution of images, one of codes, and a linear layer; 8 bits at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.second(self.first(x).relu())
        return self.head(x.relu().mean((2, 3))), x


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Edit]:
    """Every layer on codes, whatever it pays; the edits of the passes."""
    edits: list[Edit] = []
    monkeypatch.setattr(choice, "_CALLS", -1.0)
    monkeypatch.setattr(entry, "run", lambda gm, passes: edits.extend(run(gm, passes)))
    return edits


def losses(q: nn.Module, forward: Any, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    optimizer, found = torch.optim.SGD(q.parameters(), lr=0.05), []
    for x, target in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x)[0], target)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@needs_vnni
@pytest.mark.parametrize("autocast", [False, True])
def test_fifty_steps_have_the_losses_of_levels(done: list[Edit], autocast: bool) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    # A second size makes the graph one of free sizes.
    sizes = [8] * 50 if autocast else [8, 8, 5, 8, 8] * 10
    batches = [(torch.randn(size, 3, 8, 8), torch.randint(0, 10, (size,))) for size in sizes]
    q = octav_fx.quantize(Net(), batches[0][0])
    simulated = copy.deepcopy(q)
    forward = torch.compile(q, backend="octav", options={"integer": "auto"})
    with torch._inductor.config.patch(force_disable_caches=True), torch.autocast("cpu", torch.bfloat16, autocast):
        found, expected = losses(q, forward, batches), losses(simulated, simulated, batches)
        y, z = forward(batches[0][0])[1], simulated(batches[0][0])[1]
    assert [edit.verb for edit in done].count("codes in forward") == (3 if autocast else 6)
    # What comes out lies in memory as it would.
    assert y.stride() == z.stride()
    first, *others = (abs(a - b) for a, b in zip(found, expected, strict=True))
    # The first step: sums of at most 144 products in float32, or results that are rounded to bfloat16, through three
    # layers; each relative, of logits below 1.
    assert first <= 3 * (2**-8 if autocast else 144 * 2**-24)
    # Then a value between two codes may fall to either: one of 16 levels of one of 16 places that a logit is the mean
    # of, and logits are below 1. Under autocast many do, and weights move apart: by 50 steps of 0.05 times gradients
    # of about 1, which differ by the rounding of three layers. A wrong step or sign moves losses by tenths.
    assert max(others) <= (3 * 2**-8 * (1 + 50 * 0.05) if autocast else 1 / 16 / 16)


def test_compiled_graphs_are_cached_by_their_passes() -> None:
    assert entry._Stage(entry.lower_passes("off")).uuid() != entry._Stage(entry.lower_passes("auto")).uuid()
