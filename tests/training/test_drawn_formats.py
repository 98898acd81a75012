"""Any fields of Config at once: what is drawn trains on from a checkpoint, and deploys as it was frozen."""

import copy
import io
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx import Config, OctavError, quantize
from octav_fx.clips.gradients import GRADIENTS
from octav_fx.clips.learned import LEARNED
from octav_fx.clips.methods import METHODS
from octav_fx.formats.registry import NAMES
from octav_fx.formats.scales import SCALES
from octav_fx.nn import FakeQuantizer, IntegerWeight, StoredWeight
from octav_fx.ops.quantize.reference import quantize as codes_of

BITS = [None, *range(2, 9)]
FIELDS: dict[str, list[Any]] = {
    "weight_bits": BITS,
    "activation_bits": BITS,
    # Integers as often as all others.
    "weight_format": [*NAMES, *["int"] * len(NAMES)],
    "activation_format": [*NAMES, *["int"] * len(NAMES)],
    "weight_granularity": ["tensor", "channel", "group-2", "group-4", "group-8"],
    "activation_granularity": ["tensor", "token", "group-2", "group-4", "group-8"],
    "scale_format": [*SCALES],
    "clip": [*METHODS, *LEARNED],
    "weight_gradient": [*GRADIENTS],
    "activation_gradient": [*GRADIENTS],
    "signed_activations": [False, True],
    "narrow_weights": [False, True],
}


def drawn(chance: random.Random) -> dict[str, Any]:
    """Fields that combine."""
    while True:
        fields = {name: chance.choice(values) for name, values in FIELDS.items() if chance.random() < 0.6}
        try:
            Config(overrides={"*": fields})
        except OctavError:
            continue
        return fields


class Product(nn.Module):
    """[B, M, K] -> [B, M, M]: of activations."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ x.relu().transpose(1, 2)


# Modules whose sums have 8 or 16 terms along their axis, and shapes of what they take.
KINDS: list[tuple[Any, tuple[int, ...]]] = [
    (lambda: nn.Linear(16, 8), (3, 4, 16)),
    (lambda: nn.Conv2d(8, 8, 3), (2, 8, 5, 5)),
    (lambda: nn.Conv2d(16, 8, 2, groups=2), (2, 16, 4, 4)),
    (lambda: nn.ConvTranspose1d(16, 8, 2, groups=2), (2, 16, 4)),
    (Product, (2, 8, 8)),
]


class Drawn(nn.Module):
    """A module for each case, with an input of its own."""

    def __init__(self, cases: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(KINDS[kind][0]() for kind in cases)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def case(seed: int, count: int) -> tuple[nn.Module, Config, tuple[Tensor, ...]]:
    """A net of drawn modules, each with drawn settings, and what it takes."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    kinds = [chance.randrange(len(KINDS)) for _ in range(count)]
    overrides = {f"layers.{i}": drawn(chance) for i in range(count)}
    return (
        Drawn(kinds),
        Config(edge_bits=None, overrides=overrides),
        tuple(torch.randn(KINDS[kind][1]) for kind in kinds),
    )


def backward(outputs: list[Tensor]) -> None:
    torch.stack([y.square().mean() for y in outputs]).sum().backward()


def train(q: nn.Module, optimizer: torch.optim.Optimizer, inputs: tuple[Tensor, ...], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        backward(q(*inputs))
        optimizer.step()


def optimizer_of(q: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(q.parameters(), lr=0.05, momentum=0.9)


seeds = pytest.mark.parametrize("seed", range(3))


@pytest.mark.slow
@seeds
def test_training_goes_on_where_a_checkpoint_was_written(seed: int) -> None:
    net, config, inputs = case(seed, 16)
    q, again = (quantize(copy.deepcopy(net), inputs, config) for _ in range(2))
    learned = {name for name, _ in q.named_parameters() if name.endswith(".learned")}
    assert set(q.state_dict()) == set(net.state_dict()) | learned
    optimizer, other = optimizer_of(q), optimizer_of(again)
    train(q, optimizer, inputs, 2)
    assert all(p.grad is None or p.grad.isfinite().all() for p in q.parameters())
    file = io.BytesIO()
    torch.save((q.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    state, of_optimizer = torch.load(file)
    again.load_state_dict(state)
    other.load_state_dict(of_optimizer)
    train(q, optimizer, inputs, 2)
    train(again, other, inputs, 2)
    for (name, one), two in zip(q.named_parameters(), again.parameters(), strict=True):
        # A fixed point that is reached from another clip differs by a few roundings.
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
@seeds
def test_frozen_loaded_and_converted_they_are_the_same(seed: int) -> None:
    net, config, inputs = case(seed, 16)
    q = quantize(copy.deepcopy(net), inputs, config)
    train(q, optimizer_of(q), inputs, 2)
    octav_fx.freeze(octav_fx.calibrate(q.eval(), [inputs]))
    expected = q(*inputs)
    again = quantize(net, inputs, config).eval()
    again.load_state_dict(q.state_dict())
    exact, fast = octav_fx.convert(q, integers=False), octav_fx.convert(q)
    for i, (y, loaded, whole, quick) in enumerate(
        zip(expected, again(*inputs), exact(*inputs), fast(*inputs), strict=True)
    ):
        assert torch.equal(loaded, y), i
        assert torch.equal(whole, y), i
        # 64 products at most in another order: layers read what is given, and no code of theirs is rounded from a sum.
        torch.testing.assert_close(quick, y, rtol=0, atol=128 * 2.0**-24 * float(y.abs().max()), msg=str(i))
    for path, part in exact.named_modules():
        if isinstance(part, (IntegerWeight, StoredWeight)):
            quantizer, layer = q.get_submodule(path), path.removeprefix("quantizers.layers_").removesuffix("_weight")
            assert isinstance(quantizer, FakeQuantizer)
            assert quantizer.clip is not None
            codes = codes_of(q.get_parameter(f"layers.{layer}.weight").detach(), quantizer.clip, str(quantizer.spec))
            form = quantizer.spec.format
            # Beyond the clip are the codes for backward.
            assert torch.equal(part.integers().int(), codes.int().clamp(form.low, form.high)), path
