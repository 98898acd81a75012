"""The target "tensorrt": the structure that it takes, and the numbers of the file in another runtime."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from octav_fx import Config, OctavError, Rule, calibrate, export_onnx, freeze, quantize, weight
from tests.support.deployable import trained
from tests.support.deployable_models import LANGUAGE, frozen, relative, shortened
from tests.support.onnx_files import ready

CASES = shortened()


def exported(q: nn.Module, inputs: Any, folder: Path, **options: Any) -> onnx.ModelProto:
    path = folder / "tensorrt.onnx"
    export_onnx(q, inputs, path, target="tensorrt", **options)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, inputs: tuple[Tensor, ...]) -> Tensor:
    """What the nodes say; onnxruntime's optimizer would round the biases."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


class File:
    """The nodes of a file by what they make and read."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.makers = {output: node for node in self.nodes for output in node.output}
        self.values = {tensor.name: tensor for tensor in model.graph.initializer}

    def value(self, name: str) -> Tensor:
        array = numpy_helper.to_array(self.values[name])
        return torch.from_numpy(array.astype("float32"))

    def is_dequantized(self, name: str) -> bool:
        maker = self.makers.get(name)
        while maker is not None and maker.op_type in ("Transpose", "Reshape", "Flatten", "MaxPool", "Slice"):
            maker = self.makers.get(maker.input[0])
        return maker is not None and maker.op_type == "DequantizeLinear"

    def check_rules(self) -> None:
        """Signed, symmetric, positive; one scale for each activation; each Q read by DQ; a weight's codes constant."""
        assert TensorProto.UINT8 not in {tensor.data_type for tensor in self.values.values()}
        for node in self.nodes:
            assert node.domain == ""
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            scale, zero = self.value(node.input[1]), self.value(node.input[2])
            assert (scale > 0).all()
            assert not zero.any()
            is_constant = node.input[0] in self.values
            kind = self.values[node.input[2]].data_type
            assert kind in ((TensorProto.INT8, TensorProto.INT4) if is_constant else (TensorProto.INT8,))
            if node.op_type == "QuantizeLinear":
                assert scale.dim() == 0
                readers = [other.op_type for other in self.nodes if node.output[0] in other.input]
                assert readers and set(readers) == {"DequantizeLinear"}
            elif not is_constant:
                assert self.makers[node.input[0]].op_type == "QuantizeLinear"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vit_b_16", *LANGUAGE])
def test_the_rules_and_the_numbers(name, tmp_path):
    q, inputs = frozen(CASES[name], Config(4, 4, edge_bits=4, residual_bits=4))
    model = exported(q, inputs, tmp_path)
    file = File(model)
    file.check_rules()
    for node in file.nodes:
        if node.op_type == "Conv":
            assert all(map(file.is_dequantized, node.input[:2]))
            # Its bias is inside, in float.
            assert len(node.input) == 3 and file.values[node.input[2]].data_type == TensorProto.FLOAT
    sums = [node for node in file.nodes if node.op_type == "Add" and not set(node.input) & set(file.values)]
    joined = [all(map(file.is_dequantized, node.input)) for node in sums]
    assert any(joined) and (name != "resnet18" or all(joined))
    with torch.no_grad():
        # In another order of roundings, which moves a code at a tie.
        assert relative(run(model, inputs), q(*inputs)) < 0.05


@pytest.mark.parametrize("bits", [2, 4, 7])
@pytest.mark.parametrize("between", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.7), nn.Tanh()])
@pytest.mark.slow
def test_codes_of_fewer_bits_saturate(bits, between, tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 5, 3), trained(nn.BatchNorm2d(5)), between, nn.Flatten(), nn.Linear(180, 4)).eval()
    q, x = ready(net, Config(bits, bits, edge_bits=None))
    model = exported(q, x, tmp_path)
    File(model).check_rules()
    with torch.no_grad():
        for given in (x, 10 * x, torch.randn(7, 3, 8, 8)):
            torch.testing.assert_close(run(model, (given,)), q(given), rtol=1e-5, atol=1e-5)


def projected(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.t()


class Projection(nn.Module):
    """A layer of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return projected(x, self.weight)


@pytest.mark.slow
def test_weights_alone_are_int4(tmp_path):
    x = torch.randn(3, 8)
    rule = Rule("projected", (weight(1, "w", channel=0),), target=projected)
    q = freeze(calibrate(quantize(Projection().eval(), x, Config(4, edge_bits=None), rules=[rule]), [x]))
    model = exported(q, x, tmp_path)
    file = File(model)
    file.check_rules()
    assert {t.data_type for name, t in file.values.items() if name.endswith(".codes")} == {TensorProto.INT4}
    assert "QuantizeLinear" not in {node.op_type for node in file.nodes}
    with torch.no_grad():
        torch.testing.assert_close(run(model, (x,)), q(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_what_tensorrt_cannot_say(tmp_path):
    q, x = ready(config=Config(8, 8))
    with pytest.raises(OctavError, match=r"quantizers\.\S+: codes up to 255 .* Config\(signed_activations=True\)"):
        exported(q, x, tmp_path)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), trained(nn.BatchNorm2d(5))).eval()
    with torch.no_grad():
        # Beyond the clip, below zero, behind a negative factor.
        net[0].weight[0, 0, 0, 0] = -50
    q, x = ready(net, Config(8, 8))
    with pytest.raises(OctavError, match=r"quantizers\.0_weight: .* Config\(narrow_weights=True\)"):
        exported(q, x, tmp_path)
    assert not list(tmp_path.iterdir())
