"""deployment: one row for each operand, sizes that add up, differences that are measured."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import octav_fx
from octav_fx import Config, OctavError, calibrate, convert, deployment, export_onnx, freeze, quantize, rows
from octav_fx.__main__ import main
from octav_fx.deploy.codes import codes_of_quantizers, moved
from octav_fx.deploy.convert import multiplied, rewritten
from octav_fx.deploy.deployment import _FLOAT
from octav_fx.ir.pipeline import run
from octav_fx.nn import StaticQuantizer
from octav_fx.passes import COMPUTE, CONVERT
from tests.support.blocks import Block, Net, batch
from tests.support.deployable_models import WHOLE, frozen


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
    # The file computes what the frozen model does; oneDNN rounds scaled sums in another order, a few parts in 2**23.
    assert found.onnx_difference == 0
    assert found.converted_difference < 1e-6
    # No code of these moves; those of weights cannot.
    assert [row.moved for row in found.rows] == [0, None, 0, None]
    # The file is of another state now.
    with torch.no_grad():
        q.get_submodule("4").bias.add_(1)
    assert deployment(q, x, tmp_path / "model.onnx").onnx_difference > 0.1


def test_codes_that_moved_are_counted():
    expected = {"a": [torch.tensor([1, 2, 3], dtype=torch.uint8), torch.tensor([4], dtype=torch.uint8)], "b": []}
    found = {"a": [torch.tensor([1, 3, 3], dtype=torch.uint8), torch.tensor([4], dtype=torch.uint8)], "b": []}
    assert moved(found, expected) == {"a": 0.25, "b": 0}


class Times(nn.Module):
    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return x * table


class UsersTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.times, self.table = nn.Linear(8, 8), Times(), nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.times(self.a(x), table=self.table)


def test_a_table_of_the_users_is_no_table_of_codes():
    x = torch.randn(2, 8)
    q = quantize(UsersTable().eval(), x, Config(edge_bits=None), leaves=[Times])
    converted = convert(freeze(calibrate(q, [x])))
    assert list(codes_of_quantizers(converted, (x,), {})) == ["quantizers.a_input"]


@pytest.mark.parametrize("integers", [False, True])
def test_layers_read_the_codes_that_are_given(integers):
    q, x = ready()
    converted = convert(q, integers=integers)
    expected = codes_of_quantizers(converted, (x,), {})
    image, hidden = expected
    zeros = {image: [torch.full_like(expected[image][0], 8)], hidden: expected[hidden]}
    found = codes_of_quantizers(converted, (x,), {}, zeros)
    # What a quantizer returns is that of its own input; the layer behind it reads an image of zeros.
    assert torch.equal(found[image][0], expected[image][0])
    assert not torch.equal(found[hidden][0], expected[hidden][0])
    assert all(len(channel.unique()) == 1 for channel in found[hidden][0].unflatten(1, (4, 36)).unbind(1))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "encoder", "gpt"])
def test_codes_of_every_quantizer_are_found(name, bits):
    q, inputs = frozen(WHOLE[name], Config(bits, bits, residual_bits=8))
    levels = rewritten(q, CONVERT)
    converted = multiplied(copy.deepcopy(levels))
    run(levels, COMPUTE)
    found, expected = (codes_of_quantizers(c, inputs, {}) for c in (converted, levels))
    activations = {name for name, part in levels.named_modules() if isinstance(part, StaticQuantizer)}
    assert found.keys() == expected.keys() == activations
    # A code that moves moves those behind it, here through 60 layers of random weights; of other tensors nearly all
    # codes would differ.
    assert max(moved(found, expected).values()) < 0.25


@pytest.mark.models
@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_latency_where_asked_for():
    q, x = ready()
    assert not deployment(q, x).latency
    found = deployment(q, x, latency=True)
    assert {name.partition(", ")[0] for name in found.latency} == {"float", "integers"}
    assert len(found.latency) in (6, 8)
    assert all(isinstance(value, float) and value > 0 for value in found.latency.values()), found.latency
    assert " ms" in str(found).splitlines()[-1]


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


def test_only_of_what_was_quantized():
    q, x = ready()
    with pytest.raises(OctavError, match=r"holds no module"):
        deployment(convert(q), x)


@pytest.mark.models
def test_a_model_in_blocks():
    x = batch()
    q = quantize(Net(depth=2).eval(), x, Config(4, 8, residual_bits=8, edge_bits=None), blocks=[Block])
    found = deployment(freeze(calibrate(q, [x])), x)
    assert [(row.node, row.operand, row.bits) for row in found.rows] == [(r.node, r.operand, r.bits) for r in rows(q)]
    runs = {row.node: row.runs for row in found.rows}
    layers = ["stem", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head", "tied"]
    # What a block returns is read by the norm of the next one.
    assert runs == {**dict.fromkeys(layers, "integers"), **dict.fromkeys(["blocks.0.add", "blocks.1.add"], _FLOAT)}
    assert found.bytes >= sum(row.bytes for row in found.rows)
    assert found.float_bytes == sum(t.numel() * t.element_size() for t in Net(depth=2).parameters())
    assert found.onnx_difference == 0
    assert {row.moved for row in found.rows if row.operand != "weight"} == {0}
    # The quantized model as a part of another one.
    inside = deployment(nn.Sequential(q), x)
    assert [row.runs for row in inside.rows] == [row.runs for row in found.rows]


@pytest.mark.models
def test_sums_and_moves_on_codes():
    x = torch.randn(2, 8, 8, 8)
    q = quantize(Joined().eval(), x, Config(8, 8, residual_bits=8))
    runs = {row.node: row.runs for row in deployment(freeze(calibrate(q, [x])), x).rows}
    assert runs == dict.fromkeys(["first", "chunk", "left", "add", "mean", "head"], "integers")


class Joined(nn.Module):
    """Halves of a convolution, of which one is convolved, and their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.head = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.first(x).relu().chunk(2, 1)
        return self.head((self.left(left) + right).relu().mean((2, 3)))


@pytest.mark.models
def test_a_quantizer_of_a_pool_of_its_own_levels():
    """The trees of DLA: both a layer and a pool read one map, and the pool's codes are that map's."""

    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.project = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
            self.down, self.pool = nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.MaxPool2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.stem(x).relu()
            return self.down(y) + self.project(self.pool(y))

    x = torch.randn(2, 3, 8, 8)
    q = freeze(calibrate(quantize(Tree().eval(), x, Config(edge_bits=None, residual_bits=8)), [x]))
    found = deployment(q, x)
    layers = [row for row in found.rows if row.operand in ("input", "weight")]
    assert [row.runs for row in layers] == ["integers"] * 6
    assert all(row.moved is not None for row in layers if row.operand == "input")


@pytest.mark.slow
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
    assert "is no folder that can be written to" in capsys.readouterr().err


def test_the_names_are_public():
    assert octav_fx.deployment is deployment
