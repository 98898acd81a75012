"""export_onnx: what onnxruntime computes is what the converted model computes, layer by layer from equal operands."""

import math
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from octav_fx import Config, calibrate, export_onnx, freeze, quantize
from octav_fx.export import run_onnx
from tests.deployed import LANGUAGE, Case, Seen, check_codes, frozen, images, models, named, observed, relative


def shortened() -> dict[str, Case]:
    """Every kind of block of the large models, fewer times: exporting takes a time for each node."""
    resnet, efficient = models.resnet, models.efficientnet

    blocks = [efficient.MBConvConfig(*row) for row in ((1, 3, 1, 32, 16, 1), (6, 5, 2, 16, 40, 2))]
    return {
        "resnet18": named("resnet18"),
        "resnet50": Case(lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10), images),
        "mobilenet_v2": Case(
            lambda: models.MobileNetV2(10, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]]), images
        ),
        "mobilenet_v3": Case(lambda: models.MobileNetV3(_settings(), 64, num_classes=10), images),
        "efficientnet_b0": Case(lambda: efficient.EfficientNet(blocks, 0.2, num_classes=10), images),
        "swin_t": Case(lambda: models.SwinTransformer([4, 4], 24, [2, 2], [3, 6], [4, 4], num_classes=10), images),
        "vit_b_16": Case(
            lambda: models.vision_transformer.VisionTransformer(32, 16, 2, 4, 64, 128, num_classes=10), images
        ),
        **LANGUAGE,
    }


def _settings() -> list[object]:
    make = models.mobilenetv3.InvertedResidualConfig
    rows = ((16, 3, 16, 16, True, "RE", 2, 1), (16, 5, 72, 24, True, "HS", 2, 1), (24, 5, 96, 24, True, "HS", 1, 1))
    return [make(*row, 1.0) for row in rows]


CASES = shortened()


def with_given_activations(path: Path) -> tuple[bytes, list[tuple[str, str]]]:
    """The model with every activation's levels as an output, and read from an input; (quantizer, output) in order."""
    model = onnx.load(path)
    graph, found = model.graph, []
    # <quantizer>/<value>.dequantize; of a weight there is no value.
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and "/" in node.name:
            found.append((node.name.partition("/")[0], node.output[0]))
    cut = {output for _, output in found}
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in cut:
                node.input[i] = f"{name}.given"
    for output in cut:
        graph.input.append(helper.make_tensor_value_info(f"{output}.given", TensorProto.FLOAT, None))
        graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    return model.SerializeToString(), found


def computed(
    path: Path, inputs: tuple[Tensor, ...], given: dict[str, list[Seen]]
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The output of an ONNX file and what its quantizers return, where every layer reads the levels given."""
    model, calls = with_given_activations(path)
    assert sorted(name for name, _ in calls) == sorted(name for name, seen in given.items() for _ in seen)
    names = [value.name for value in onnx.load(path).graph.input]
    feed = dict(zip(names, inputs, strict=True))
    count: dict[str, int] = {}
    for name, output in calls:
        feed[f"{output}.given"] = given[name][count.get(name, 0)].y
        count[name] = count.get(name, 0) + 1
    outputs = run_onnx(model, feed)
    found: dict[str, list[Tensor]] = {}
    for name, output in calls:
        found.setdefault(name, []).append(outputs[output])
    return next(iter(outputs.values())), found


def small(*extra: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), *extra, nn.Flatten(), nn.Linear(180, 4)
    ).eval()


def ready(model: nn.Module | None = None, config: Config | None = None):
    x = torch.randn(2, 3, 8, 8)
    q = quantize(small() if model is None else model, x, config)
    return freeze(calibrate(q, [x])), x


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_computes_the_same(name, tmp_path):
    q, inputs = frozen(CASES[name])
    path = tmp_path / "model.onnx"
    export_onnx(q, inputs, path)
    # Another batch than the one that was exported.
    for given in (inputs, CASES[name].inputs(3)):
        out, activations, _ = observed(q, given)
        ours, found = computed(path, given, activations)
        moved = check_codes(activations, found)
        assert relative(ours, out) < 1e-4
        # Every code is the same from equal operands: then so is the whole model, unless rounding adds up to a tie.
        total = sum(seen.y.numel() for calls in activations.values() for seen in calls)
        assert moved <= math.ceil(1e-4 * total)
