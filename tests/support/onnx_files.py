"""ONNX files of deployed models: small nets to write, and a file run with every layer reading what it is given."""

from collections import Counter
from collections.abc import Callable
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


def with_given_activations(path: Path, given: dict[str, list[Seen]]) -> tuple[bytes, dict[str, Seen]]:
    """The model with every activation read from an input, and its levels an output: call -> what is given to it.

    A call is named quantizers.<quantizer>/<value>; its input is <call>.given, its output <call>.levels. What is given
    is rounded again, to itself: the pattern that runtimes fuse stays whole.
    """
    model = onnx.load(path)
    graph = model.graph
    calls: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        # quantizers.<quantizer>/<value>.<step>
        if node.name.startswith("quantizers.") and "/" in node.name:
            calls.setdefault(node.name.rpartition(".")[0], []).append(node)
    assert Counter(call.partition("/")[0] for call in calls) == {name: len(seen) for name, seen in given.items()}
    order = {name: iter(seen) for name, seen in given.items()}
    values = {call: next(order[call.partition("/")[0]]) for call in calls}
    for call, chain in calls.items():
        previous = chain[0].input[0]
        for node in chain:
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            copied.name += ".seen"
            copied.input[0], copied.output[0] = previous, f"{node.output[0]}.seen"
            previous = copied.output[0]
            graph.node.append(copied)
        graph.node[-1].output[0] = f"{call}.levels"
        chain[0].input[0] = f"{call}.given"
        graph.input.append(helper.make_tensor_value_info(f"{call}.given", TensorProto.FLOAT, values[call].y.shape))
        graph.output.append(helper.make_tensor_value_info(f"{call}.levels", TensorProto.FLOAT, None))
    return model.SerializeToString(), values


def computed(
    path: Path,
    inputs: tuple[Tensor, ...],
    given: dict[str, list[Seen]],
    run: Callable[[bytes, dict[str, Tensor]], dict[str, Tensor]] = run_onnx,
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The output of an ONNX file and what its quantizers return, where every layer reads the levels given."""
    model, values = with_given_activations(path, given)
    names = [value.name for value in onnx.load(path).graph.input]
    feed = dict(zip(names, inputs, strict=True)) | {f"{call}.given": seen.y for call, seen in values.items()}
    outputs = run(model, feed)
    found: dict[str, list[Tensor]] = {}
    for call in values:
        found.setdefault(call.partition("/")[0], []).append(outputs[f"{call}.levels"])
    return next(iter(outputs.values())), found
