"""Where Newton starts changes nothing: a clip is the fixed point of its tensor, whatever the hint."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octav_fx import Config, quantize
from octav_fx.formats.spec import integers
from octav_fx.nn import FakeQuantizer, Settings
from tests.support.samples import SAMPLES, squared_error
from tests.support.settings import settings_of

ROWS = 16


def activation(n: int) -> Tensor:
    """What the third layer of a small network gets to see after a relu, channels with scales of their own."""
    layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, ROWS, 3), nn.ReLU())
    with torch.no_grad():
        layers[1].weight.exponential_()
        x = layers(torch.randn(-(-n // (ROWS * 100)), 3, 14, 14))
    return x.transpose(0, 1).flatten()[:n]


DATA = {name: SAMPLES[name] for name in ("gaussian", "laplace", "uniform", "half_rectified")} | {
    "activation": activation
}
NON_NEGATIVE = ("half_rectified", "activation")
SIGNED = [(name, signed) for name in DATA for signed in ((True, False) if name in NON_NEGATIVE else (True,))]
FAR = {"20 % low": 0.8, "20 % high": 1.2, "100x too high": 100.0, "100x too low": 0.01, "never set": 0.0}


def quantizer(bits: int, signed: bool, dim: int | None, method: str = "octav") -> FakeQuantizer:
    return FakeQuantizer(settings_of(bits, signed, dim, method, "pwl"), () if dim is None else (ROWS,))


def tensor(name: str) -> Tensor:
    return DATA[name](ROWS * 2000).reshape(ROWS, 2000)


def settled(q: FakeQuantizer, x: Tensor) -> Tensor:
    """The clip after a few steps on the same tensor."""
    for _ in range(3):
        q(x)
    return q.hint.clone()


def error(x: Tensor, clip: Tensor, settings: Settings) -> Tensor:
    """The squared quantization error of each row, or of all of x."""
    rows, clips = (x, clip) if settings.spec.granularity.axis is not None else (x.reshape(1, -1), clip.reshape(1))
    return squared_error(rows, clips, settings.spec.format.bits, settings.spec.format.signed)


@pytest.mark.parametrize("dim", [None, 0])
@pytest.mark.parametrize(("bits", "tolerance"), [(4, 1e-4), (8, 1e-3)])
@pytest.mark.parametrize(("name", "signed"), SIGNED)
def test_a_hint_five_percent_off_changes_no_clip(name, signed, bits, tolerance, dim):
    x, q = tensor(name), quantizer(bits, signed, dim)
    clip = settled(q, x)
    for factor in (0.95, 1.05):
        q.hint.copy_(clip * factor)
        q(x)
        torch.testing.assert_close(q.hint, clip, rtol=tolerance, atol=0)


@pytest.mark.parametrize("method", ["octav", "octav-grid"])
@pytest.mark.parametrize("dim", [None, 0])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("name", "signed"), SIGNED)
@pytest.mark.parametrize("far", FAR)
def test_from_any_hint_the_same_step_has_the_error_of_the_fixed_point(far, name, signed, bits, dim, method):
    x, q = tensor(name), quantizer(bits, signed, dim, method)
    clip = settled(q, x)
    q.hint.copy_(clip * FAR[far])
    y = q(x)
    expected, found = error(x, clip, q.settings), error(x, q.hint, q.settings)
    assert (found <= 1.02 * expected).all()
    # That of the hint is that of what came out: the clip was used in the very step that found it.
    rows = -1 if dim is not None else (0, 1)
    torch.testing.assert_close((y - x).double().square().sum(rows).reshape(-1), found, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dim", [None, 0])
def test_the_op_does_not_depend_on_its_hint(dim):
    x = tensor("gaussian")
    shape = () if dim is None else (ROWS,)
    clips = [
        torch.ops.octav.optimal_clip(x, torch.full(shape, hint), integers(4, True, dim), "octav")
        for hint in (0.0, 0.02, 2.4, 2.6, 250.0, torch.inf, torch.nan, -1.0)
    ]
    for clip in clips[1:]:
        torch.testing.assert_close(clip, clips[0], rtol=1e-6, atol=0)


def test_every_row_returns_from_a_hint_of_its_own():
    x, q = tensor("laplace"), quantizer(4, True, 0)
    clip = settled(q, x)
    q.hint.copy_(clip * torch.logspace(-3, 3, ROWS))
    q(x)
    torch.testing.assert_close(q.hint, clip, rtol=1e-6, atol=0)


def test_a_jump_of_the_data_is_followed_in_one_step():
    x, q = tensor("gaussian"), quantizer(4, True, None)
    clip = settled(q, x)
    for factor in (1000.0, 1e-6):
        q(x * factor)
        torch.testing.assert_close(q.hint, clip * factor, rtol=1e-5, atol=0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


@pytest.mark.compile
def test_compiled_hints_five_percent_off_change_no_clip():
    torch.compiler.reset()
    x = torch.randn(128, 32)
    q = quantize(Net(), x, Config(edge_bits=None))
    compiled = torch.compile(q, backend="octav", fullgraph=True)
    expected = compiled(x).detach()
    hints = {name: quantizer.hint for name, quantizer in q.quantizers.named_children()}
    clips = copy.deepcopy(hints)
    assert len(clips) == 4
    for factor in (0.95, 1.05, 0.0, 100.0):
        for hint in hints.values():
            hint.mul_(factor)
        out = compiled(x)
        for name, hint in hints.items():
            torch.testing.assert_close(hint, clips[name], rtol=1e-4, atol=0)
        # Clips that differ in their last bits scale the levels by as much, and move no value to another one.
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
