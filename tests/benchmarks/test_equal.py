"""./dev bench equal: what it counts, what must hold, and what it keeps."""

import pytest
import torch
from torch import nn

from benchmarks import equal, inference, result, trained
from octav_fx import Config

pytestmark = pytest.mark.slow


class Net(nn.Sequential):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
        super().__init__(*layers)


def task(name: str) -> trained.Task:
    torch.manual_seed(0)
    x, classes = torch.randn(64, 3, 8, 8), torch.randint(5, (64,))
    return trained.Task(Net(), lambda: (x[:8], classes[:8]), x, classes)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    monkeypatch.setattr(trained, "task", task)
    monkeypatch.setattr(trained, "NETS", ("resnet18", "other"))
    monkeypatch.setattr(equal, "CONFIGS", {"W8A4": Config(8, 4)})
    monkeypatch.setattr(equal, "of_float", lambda net, given: [])
    return tmp_path


def test_every_runtime_is_compared_once(folder, monkeypatch):
    equal.main("res*")
    rows = {row["runtime"]: row for row in result.read("equal")["rows"]}
    assert list(rows)[:4] == ["definition", "PyTorch", "onnxruntime", "onnxruntime, fixed batch"]
    # The image, and what both layers behind it read.
    assert {row["codes"] for row in rows.values()} == {64 * (3 * 64 + 4 * 36 + 64)}
    assert all(row["holds"] and row["inputs"] == 64 for row in rows.values())
    for runtime in ("definition", "onnxruntime", "onnxruntime, fixed batch"):
        assert rows[runtime]["equal"] == 64
        assert rows[runtime]["moved"] == rows[runtime]["end to end"] == rows[runtime]["difference"] == 0
    monkeypatch.setattr(equal, "compared", lambda *given: pytest.fail("it is there"))
    equal.main("res*")


def test_a_quantizer_that_is_not_installed_is_a_row(monkeypatch):
    monkeypatch.setattr(inference, "_NEEDS", {"absent": ("no_such_package",)})
    monkeypatch.setattr(equal, "_OTHERS", {"twice": lambda case, x: 2 * case.model(x), "absent": None})
    given = task("")
    own, twice, absent = equal.of_float("other", given)
    assert own["equal"] == 64
    # Twice the logits: other bits, the same classes.
    assert twice["equal"] == 0
    assert twice["same class"] == 1
    assert twice["accuracy"] == own["accuracy"]
    assert absent == {"net": "other", "bits": "float", "runtime": "absent", "note": "not installed: no_such_package"}


def test_a_layer_that_moves_codes_is_told_from_those_behind_it(folder, monkeypatch):
    convert = equal.octav_fx.convert

    def wrong(q, *, integers=True):
        made = convert(q, integers=integers)
        if integers:
            # A larger second convolution.
            made.get_submodule("quantizers.2_weight").scale.mul_(1.5)
        return made

    monkeypatch.setattr(equal.octav_fx, "convert", wrong)
    (row,) = (row for row in equal.compared("resnet18", task(""), "W8A4") if row["runtime"] == "PyTorch")
    assert not row["holds"]
    assert 0 < row["moved"] <= row["end to end"]
    assert row["equal"] < 64


@pytest.mark.parametrize(
    ("net", "runtime", "residual_bits", "moved", "same", "held"),
    [
        ("resnet18", "onnxruntime", 8, 1, 1.0, False),
        ("resnet18", "onnxruntime", None, 1, 1.0, True),
        ("gpt", "onnxruntime", 8, 1, 1.0, True),
        ("gpt", "onnxruntime", 8, 1, 0.99, False),
        ("gpt", "PyTorch", 8, 10, 0.9, True),
        ("gpt", "PyTorch", 8, 11, 1.0, False),
        ("resnet18", "OpenVINO", 8, 1000, 0.9, True),
        ("resnet18", "OpenVINO", 8, 1001, 1.0, False),
    ],
)
def test_what_must_hold(net, runtime, residual_bits, moved, same, held):
    row = {"codes": 10**6, "moved": moved, "same class": same, "equal": 256, "inputs": 256}
    assert equal.bound(net, runtime, residual_bits).holds(row) is held
