"""deployment: one row for each operand, sizes that add up, differences that are measured."""

import dataclasses

import pytest
import torch
from torch import nn

import octav_fx
from octav_fx import Config, OctavError, calibrate, convert, deployment, export_onnx, freeze, quantize
from octav_fx.__main__ import main


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()


def ready(**config):
    x = torch.randn(2, 3, 8, 8)
    q = quantize(model(), x, Config(edge_bits=None, **config))
    return freeze(calibrate(q, [x])), x


@pytest.mark.models
def test_rows_and_sizes():
    q, x = ready()
    found = deployment(q, x)
    assert [(row.node, row.operand, row.bits) for row in found.rows] == [
        *(("0", "input", 4), ("0", "weight", 4), ("4", "input", 4), ("4", "weight", 4))
    ]
    # 108 and 288 codes, two to a byte; 4 bytes for each scale.
    assert [row.bytes for row in found.rows] == [4, 54 + 16, 4, 144 + 8]
    assert found.rows[0].scale == pytest.approx(float(q.quantizers.get_submodule("0_input").clip) / 8)
    assert found.float_bytes == 4 * (108 + 4 + 4 * 4 + 288 + 2) + 8
    assert [row.runs for row in found.rows] == ["integers"] * 4
    # Biases and their steps besides.
    assert found.bytes == sum(row.bytes for row in found.rows) + 4 * 2 * (4 + 2)
    assert found.onnx_bytes > found.bytes


@pytest.mark.models
def test_differences_are_measured(tmp_path):
    q, x = ready()
    export_onnx(q, x, tmp_path / "model.onnx")
    found = deployment(q, x, tmp_path / "model.onnx")
    # Biases are rounded. Both compute the same, and round the scaled sums in another order: a few parts in 2**23.
    assert 0 < found.converted_difference < 1e-2
    assert abs(found.onnx_difference - found.converted_difference) < 1e-6
    # No code of these moves.
    assert all(row.difference < 1e-6 for row in found.rows if row.operand == "input")
    # The file is of another state now.
    with torch.no_grad():
        q.get_submodule("4").bias.add_(1)
    assert deployment(q, x, tmp_path / "model.onnx").onnx_difference > 0.1


@pytest.mark.models
def test_what_stays_float_has_its_reason():
    q, x = ready(overrides={"0": None})
    row = deployment(q, x).rows[0]
    assert dataclasses.astuple(row) == (
        "0",
        "input",
        None,
        None,
        None,
        None,
        "override '0': None",
        "an operand is float",
    )


def test_only_the_module_itself():
    q, x = ready()
    with pytest.raises(OctavError, match=r"takes a model that one graph holds"):
        deployment(nn.Sequential(q), x)
    with pytest.raises(OctavError, match=r"holds no module"):
        deployment(convert(q), x)


@pytest.mark.models
def test_the_command(tmp_path, capsys):
    path = tmp_path / "out.onnx"
    assert main(["export", "tests.deploy.test_deployment:model", "--input", "2x3x8x8", "--onnx", str(path)]) == 0
    out = capsys.readouterr().out
    torch.manual_seed(0)
    float_model, x = model(), torch.randn(2, 3, 8, 8)
    assert out == f"{deployment(freeze(calibrate(quantize(float_model, x), [x])), x, path)}\n"
    assert "onnxruntime" in out.splitlines()[-1]
    assert (
        main(
            ["export", "tests.deploy.test_deployment:model", "--input", "2x3x8x8", "--onnx", str(tmp_path / "a" / "b")]
        )
        == 1
    )
    assert "cannot be written" in capsys.readouterr().err


def test_the_names_are_public():
    assert octav_fx.deployment is deployment
