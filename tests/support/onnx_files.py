"""ONNX files of deployed models: small nets to write, and a file run with every layer reading what it is given."""

from collections import Counter
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from octav_fx import Config, calibrate, freeze, quantize
from octav_fx.deploy.runtimes import onnx_session, run_onnx
from tests.support.deployable_models import LANGUAGE, Case, Seen, images, models, named


def shortened() -> dict[str, Case]:
    """Every kind of block of the large models, fewer times: exporting takes a time for each node."""
    resnet, efficient = models.resnet, models.efficientnet

    blocks = [efficient.MBConvConfig(*row) for row in ((1, 3, 1, 32, 16, 1), (6, 5, 2, 16, 40, 2))]
    inverted = [[1, 16, 1, 1], [6, 24, 2, 2]]
    return {
        "resnet18": named("resnet18"),
        "resnet50": Case(lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10), images),
        "mobilenet_v2": Case(lambda: models.MobileNetV2(10, inverted_residual_setting=inverted), images),
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


def small(*extra: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), *extra, nn.Flatten(), nn.Linear(180, 4)
    ).eval()


def ready(model: nn.Module | None = None, config: Config | None = None) -> tuple[nn.Module, Tensor]:
    x = torch.randn(2, 3, 8, 8)
    q = quantize(small() if model is None else model, x, config)
    return freeze(calibrate(q, [x])), x


def optimized_ops(path: Path) -> Counter[str]:
    """How often each op is in the graph that onnxruntime makes of a file."""
    optimized = path.with_suffix(".optimized")
    onnx_session(path, 1, optimized)
    return Counter(node.op_type for node in onnx.load(optimized).graph.node)


def with_given_activations(path: Path) -> tuple[bytes, list[tuple[str, str]]]:
    """The model with every activation read from an input, and its codes an output: (quantizer, output of it).

    What is given is rounded again, to itself: the pattern that runtimes fuse stays whole.
    """
    model = onnx.load(path)
    graph, found = model.graph, []
    readers = {name: node for node in graph.node for name in node.input}
    for quantizer in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        # <quantizer>/<value>.quantize
        call, output = quantizer.name.removesuffix(".quantize"), quantizer.output[0]
        clip = readers.get(output)
        chain = [quantizer, *([clip] if clip is not None and clip.name == f"{call}.clip" else [])]
        previous = quantizer.input[0]
        for node in chain:
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            copied.name += ".seen"
            copied.input[0], copied.output[0] = previous, f"{node.output[0]}.seen"
            previous = copied.output[0]
            graph.node.append(copied)
        levels = helper.make_node(
            "DequantizeLinear", [previous, *quantizer.input[1:3]], [f"{call}.levels"], name=f"{call}.levels"
        )
        levels.attribute.extend(quantizer.attribute)
        graph.node.append(levels)
        quantizer.input[0] = f"{call}.given"
        graph.input.append(helper.make_tensor_value_info(f"{call}.given", TensorProto.FLOAT, None))
        graph.output.append(helper.make_tensor_value_info(f"{call}.levels", TensorProto.FLOAT, None))
        found.append((call.partition("/")[0], call))
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
    for name, call in calls:
        feed[f"{call}.given"] = given[name][count.get(name, 0)].y
        count[name] = count.get(name, 0) + 1
    outputs = run_onnx(model, feed)
    found: dict[str, list[Tensor]] = {}
    for name, call in calls:
        found.setdefault(name, []).append(outputs[f"{call}.levels"])
    return next(iter(outputs.values())), found
