"""What the README promises, each on a net that takes milliseconds.

./dev test fast tests/test_tiny.py takes fifteen seconds, most of them imports; without fast a file of ONNX and a
compiled step come in addition.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx import Config, OctavError
from octav_fx.deploy.runtimes import run_onnx
from tests.support.on_grid import OnGrid
from tests.support.samples import fixed_point


class Net(nn.Module):
    """A convolution, a batch norm, attention over the pixels, and a head: [B, 3, 6, 6] -> [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.middle = nn.Conv2d(8, 8, 3, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.norm(self.conv(x)).relu()).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def images() -> Tensor:
    return torch.randn(8, 3, 6, 6)


def step(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients of one step."""
    model.zero_grad()
    F.cross_entropy(call(x), torch.arange(len(x)) % 5).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def trained() -> tuple[nn.Module, Tensor]:
    """A quantized net after a few steps of SGD, in eval mode, and its images."""
    x = images()
    q = octav_fx.quantize(Net(), x)
    optimizer = torch.optim.SGD(q.parameters(), lr=0.1)
    for _ in range(3):
        step(q, q, x)
        optimizer.step()
    return q.eval(), x


def frozen() -> tuple[nn.Module, Tensor]:
    q, x = trained()
    return octav_fx.freeze(octav_fx.calibrate(q, [x])), x


def test_one_line_quantizes_every_operand_of_a_copy() -> None:
    model, x = Net(), images()
    before = copy.deepcopy(model.state_dict())
    q = octav_fx.quantize(model, x, Config(edge_bits=None))
    with OnGrid(4) as seen:
        q(x)
    assert (seen.checked, seen.off_grid) == (6, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with OnGrid(4) as seen:
        model(x)
    assert len(seen.off_grid) >= seen.checked


@pytest.mark.slow
def test_training_lowers_the_loss() -> None:
    x, labels = images(), torch.arange(8) % 5
    q = octav_fx.quantize(Net(), x)
    optimizer = torch.optim.SGD(q.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(q(x), labels)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in q.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_table_has_a_row_for_each_operand() -> None:
    q = octav_fx.quantize(Net(), images())
    printed = octav_fx.table(q)
    for site in ("conv", "middle", "attention", "head"):
        assert any(line.startswith(site) for line in printed.splitlines())
    assert "quantized: 100.00% of" in printed


@pytest.mark.parametrize("training", [True, False])
def test_float_mode_is_the_float_model_bit_for_bit(training: bool) -> None:
    model, x = Net().train(training), images()
    q = octav_fx.quantize(model, x)
    with octav_fx.float_mode(q):
        ours, out = step(q, q, x), q(x)
    theirs, expected = step(model, model, x), model(x)
    assert torch.equal(out, expected) and not torch.equal(q(x), expected)
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_keys_are_those_of_the_float_model_both_ways() -> None:
    model = Net()
    q = octav_fx.quantize(model, images())
    assert list(q.state_dict()) == list(model.state_dict())
    q.load_state_dict(Net().state_dict(), strict=True)
    model.load_state_dict(q.state_dict(), strict=True)


def test_the_clip_is_the_fixed_point_of_its_tensor() -> None:
    x = torch.randn(4000)
    expected = fixed_point(x, 4, True)
    # A few roundings of float32.
    assert octav_fx.optimal_clip(x, 4).item() == pytest.approx(expected, rel=1e-6)


def test_frozen_clips_are_in_the_state_dict_and_the_output_depends_on_nothing_else() -> None:
    q, x = frozen()
    out = q(x)
    # Live clips would be those of one image; a batch of one is summed in another order, no more.
    torch.testing.assert_close(q(x[:1]), out[:1], rtol=1e-5, atol=1e-6)
    again = octav_fx.quantize(Net(), x).eval()
    again.load_state_dict(q.state_dict(), strict=True)
    assert torch.equal(again(x), out)
    octav_fx.unfreeze(q)
    assert list(q.state_dict()) == list(Net().state_dict())


def test_converted_it_holds_integers_and_multiplies_them() -> None:
    q, x = frozen()
    integers, definition = octav_fx.convert(q), octav_fx.convert(q, integers=False)
    # With this seed no value lies at a tie: what is left is one rounding in another order.
    torch.testing.assert_close(integers(x), definition(x), rtol=1e-5, atol=1e-6)
    # Biases are rounded to the grid of sums, of which a step of these codes holds some hundred.
    assert float((definition(x) - q(x)).abs().max()) < 0.01 * float(q(x).abs().max())
    kinds = {value.dtype for name, value in integers.state_dict().items() if "weight" in name}
    assert kinds & {torch.int8, torch.uint8}


@pytest.mark.slow
def test_onnxruntime_computes_the_same(tmp_path: Path) -> None:
    q, x = frozen()
    octav_fx.export_onnx(q, x, tmp_path / "net.onnx")
    (found,) = run_onnx(tmp_path / "net.onnx", x).values()
    # One rounding of the last layer in another order.
    torch.testing.assert_close(found, octav_fx.convert(q, integers=False)(x), rtol=1e-6, atol=1e-7)


@pytest.mark.compile
def test_compiled_it_computes_the_same() -> None:
    x = torch.randn(8, 6)
    q = octav_fx.quantize(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), x)
    ours, theirs = step(torch.compile(q, backend="octav", fullgraph=True), q, x), step(q, q, x)
    for name in theirs:
        # Inductor sums in another order; with this seed no value gets another code for that.
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_nothing_stays_float_silently() -> None:
    q = octav_fx.quantize(Net(), images(), Config(overrides={"middle": None}))
    covered = octav_fx.coverage(q)
    assert [site for site, _, _ in covered.skipped] == ["middle"]
    assert covered.total_macs - covered.quantized_macs == covered.skipped[0][2] > 0
    assert "override 'middle': None" in octav_fx.table(q)
    with pytest.raises(OctavError, match="middle"):
        octav_fx.quantize(Net(), images(), Config(overrides={"middle": None}), strict=True)


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (lambda: octav_fx.quantize(Net(), torch.randn(8, 4, 6, 6)), r"capture stopped at .*test_tiny\.py:\d+"),
        (lambda: octav_fx.quantize(Net(), images(), Config(overrides={"nothing": None})), "nothing"),
        (lambda: Config(weight_bits=9), "weight_bits=9: whole bits from 2 to 8"),
        (lambda: octav_fx.convert(octav_fx.quantize(Net(), images())), "freeze"),
        (lambda: octav_fx.quantize(octav_fx.quantize(Net(), images()), images()), "quantized already"),
    ],
    ids=["shape", "override", "bits", "not frozen", "twice"],
)
def test_bad_input_raises_an_error_that_names_it(fails: Callable[[], object], message: str) -> None:
    with pytest.raises(OctavError, match=message):
        fails()
