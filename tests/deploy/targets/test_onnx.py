"""export_onnx: what onnxruntime computes is what the converted model computes, layer by layer from equal operands."""

import math
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from octav_fx import Config, OctavError, calibrate, convert, export_onnx, freeze, quantize, unfreeze
from octav_fx.demo import accuracy, digits
from octav_fx.deploy.targets.onnx import run_onnx
from tests.support.deployable_models import (
    LANGUAGE,
    Case,
    Seen,
    check_codes,
    frozen,
    images,
    models,
    named,
    observed,
    relative,
)


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
    """The model with every activation read from an input, and what it would have been an output: (quantizer, output).

    What is given is rounded again, to itself: the pattern that runtimes fuse stays whole.
    """
    model = onnx.load(path)
    graph, found = model.graph, []
    makers = {output: node for node in graph.node for output in node.output}
    for dequantize in list(graph.node):
        # <quantizer>/<value>.dequantize; of a weight there is no value.
        if dequantize.op_type != "DequantizeLinear" or "/" not in dequantize.name:
            continue
        quantize_ = makers[dequantize.input[0]]
        clip = makers.get(quantize_.input[0])
        chain = [
            node
            for node in (clip, quantize_, dequantize)
            if node is not None and node.name.startswith(quantize_.name.removesuffix("quantize"))
        ]
        output = dequantize.output[0]
        previous = chain[0].input[0]
        for node in chain:
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            copied.name += ".seen"
            copied.input[0], copied.output[0] = previous, f"{node.output[0]}.seen"
            previous = copied.output[0]
            graph.node.append(copied)
        chain[0].input[0] = f"{output}.given"
        graph.input.append(helper.make_tensor_value_info(f"{output}.given", TensorProto.FLOAT, None))
        graph.output.append(helper.make_tensor_value_info(previous, TensorProto.FLOAT, None))
        found.append((dequantize.name.partition("/")[0], output))
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
        found.setdefault(name, []).append(outputs[f"{output}.seen"])
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


def test_the_whole_model_computes_the_same_and_classifies_alike(tmp_path):
    torch.manual_seed(1)
    q, x = ready()
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path)
    images = torch.randn(64, 3, 8, 8)
    (found,) = run_onnx(path, images).values()
    with torch.no_grad():
        expected = q(images)
    # No value of these images comes so near to a tie that another order of sums moves it.
    assert relative(found, expected) < 1e-4
    assert torch.equal(found.argmax(1), expected.argmax(1))


def test_a_trained_model_is_as_accurate(tmp_path):
    data = digits(0)
    model = nn.Sequential(
        *(nn.AvgPool2d(4), nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 10)),
    )
    q = quantize(model, data.train_images[:64])
    optimizer = torch.optim.SGD(q.parameters(), lr=0.05, momentum=0.9)
    for chosen in torch.randperm(len(data.train_images))[:1280].split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(q(data.train_images[chosen]), data.train_labels[chosen]).backward()
        optimizer.step()
    # With the running mean that training kept.
    freeze(q.eval())
    export_onnx(q, data.test_images[:2], tmp_path / "model.onnx")
    (found,) = run_onnx(tmp_path / "model.onnx", data.test_images).values()
    right = float((found.argmax(1) == data.test_labels).float().mean())
    assert right == accuracy(q, data)
    assert right > 0.8


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("extra", [(), (nn.ReLU6(),), (nn.Hardtanh(),), (nn.MaxPool2d(1), nn.Flatten(2))])
def test_every_width_behind_every_kind_of_clamp(bits, extra, tmp_path):
    config = Config(weight_bits=bits, activation_bits=bits, edge_bits=None)
    q, x = ready(small(*extra), config)
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path)
    # Beyond the clips too.
    for given in (x, 10 * x):
        out, activations, _ = observed(q, (given,))
        ours, found = computed(path, (given,), activations)
        check_codes(activations, found)
        assert relative(ours, out) < 1e-4
        (whole,) = run_onnx(path, given).values()
        assert relative(whole, out) < 1e-4


def test_ties_go_to_the_even_code(tmp_path):
    model = nn.Sequential(nn.Linear(8, 2)).eval()
    x = torch.arange(-8, 8).reshape(2, 8) + 0.5
    q = freeze(calibrate(quantize(model, x, Config(edge_bits=None)), [x]))
    q.get_submodule("quantizers.0_input").clip.fill_(8)
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path)
    _, activations, _ = observed(q, (x,))
    _, found = computed(path, (x,), activations)
    expected = [-8, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 7]
    assert found["quantizers.0_input"][0].flatten().tolist() == expected


def test_weights_are_stored_as_integers_with_positive_scales(tmp_path):
    model = small()
    with torch.no_grad():
        model[1].weight[0], model[1].weight[1], model[0].weight[2] = -2, 0, 0
    q, x = ready(model, Config(edge_bits=None))
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path)
    stored, c = initializers(path), convert(q, integers=False)
    for name in ("quantizers.0_weight", "quantizers.4_weight"):
        codes, part = stored[f"{name}.codes"], c.get_submodule(name)
        assert codes.data_type == TensorProto.INT4
        assert tuple(codes.dims) == part.shape
        assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(codes).astype("int8")), part.integers())
        assert (onnx.numpy_helper.to_array(stored[f"{name}.scale"]) > 0).all()
    ops = [node.op_type for node in onnx.load(path).graph.node]
    # The sign of the batch norm's first channel stands alone; all else of it is in scale and bias.
    assert ops.count("Mul") == 1
    assert "BatchNormalization" not in ops
    with torch.no_grad():
        assert relative(next(iter(run_onnx(path, x).values())), q(x)) < 1e-4


def test_the_file_is_standard_small_and_says_nothing_of_this_machine(tmp_path):
    q, x = ready()
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path)
    model = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    onnx.checker.check_model(model, full_check=True)
    assert str(Path(__file__).parent.parent).encode() not in path.read_bytes()
    assert [path] == list(tmp_path.iterdir())


def test_one_example_and_one_batch_size(tmp_path):
    q, x = ready()
    export_onnx(q, {"input": x[:1]}, tmp_path / "free.onnx")
    export_onnx(q, {"input": x[:1]}, tmp_path / "fixed.onnx", dynamic_batch=False)
    for name, dim in (("free", "batch"), ("fixed", 1)):
        (first, *_) = onnx.load(tmp_path / f"{name}.onnx").graph.input[0].type.tensor_type.shape.dim
        assert dim in (first.dim_param, first.dim_value)
    assert next(iter(run_onnx(tmp_path / "free.onnx", {"input": x}).values())).shape == (2, 4)


# Errors.


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0e(self.fc(x))


def test_an_op_that_onnx_lacks(tmp_path):
    x = torch.randn(2, 4)
    q = freeze(calibrate(quantize(Unsupported().eval(), x), [x]))
    with pytest.raises(OctavError, match=r"cannot write this model as ONNX: .*i0e"):
        export_onnx(q, x, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_outlives_a_failure(tmp_path):
    x, path = torch.randn(2, 4), tmp_path / "model.onnx"
    path.write_bytes(b"older")
    q = freeze(calibrate(quantize(Unsupported().eval(), x), [x]))
    with pytest.raises(OctavError):
        export_onnx(q, x, path)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_paths_that_cannot_be_written(tmp_path):
    q, x = ready()
    with pytest.raises(OctavError, match=r"no_such_folder.model\.onnx cannot be written: No such file or directory"):
        export_onnx(q, x, tmp_path / "no_such_folder" / "model.onnx")
    with pytest.raises(OctavError, match=r"is a folder: give the path of a file"):
        export_onnx(q, x, tmp_path)


def test_models_that_are_not_ready(tmp_path):
    q, x = ready()
    unfreeze(q)
    with pytest.raises(OctavError, match=r"call octav_fx\.calibrate .* octav_fx\.freeze"):
        export_onnx(q, x, tmp_path / "model.onnx")
    q, x = ready()
    with pytest.raises(OctavError, match=r"is torch\.float64, ONNX is written in float32: call q\.float\(\)"):
        export_onnx(q.double(), x.double(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
