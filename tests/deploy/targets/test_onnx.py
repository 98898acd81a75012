"""The target "exact", and what all targets share: what onnxruntime computes of a file is what the levels give."""

import math
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from octav_fx import Config, OctavError, calibrate, convert, export_onnx, freeze, quantize, unfreeze
from octav_fx.capture.modules import quantized_modules
from octav_fx.demo import accuracy, digits
from octav_fx.deploy.convert import rewritten
from octav_fx.deploy.exported_calls import led_by_exported_calls
from octav_fx.deploy.runtimes import run_onnx
from octav_fx.passes import CONVERT
from tests.support.deployable_models import LANGUAGE, check_codes, frozen, levels_of, observed, relative, shortened
from tests.support.given_levels import computed
from tests.support.onnx_files import ready, small

CASES = shortened()


def written(q: nn.Module, inputs: object, path: Path, **options: object) -> nn.Module:
    """Write the target "exact"; return the converted model that computes on levels, as the file does."""
    export_onnx(q, inputs, path, target="exact", **options)
    return rewritten(q, CONVERT)


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


@pytest.mark.models
@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_computes_the_same(name, tmp_path):
    q, inputs = frozen(CASES[name])
    path = tmp_path / "model.onnx"
    levels = written(q, inputs, path)
    # Another batch than the one that was exported.
    for given in (inputs, CASES[name].inputs(3)):
        out, activations, _ = observed(levels, given)
        ours, found = computed(path, given, levels_of(activations))
        moved = check_codes(activations, found)
        assert relative(ours, out) < 1e-4
        # Every code is the same from equal operands: then so is the whole model, unless rounding adds up to a tie.
        total = sum(seen.y.numel() for calls in activations.values() for seen in calls)
        assert moved <= math.ceil(1e-4 * total)


@pytest.mark.models
def test_the_whole_model_computes_the_same_and_classifies_alike(tmp_path):
    torch.manual_seed(1)
    q, x = ready()
    path = tmp_path / "model.onnx"
    levels = written(q, x, path)
    images = torch.randn(64, 3, 8, 8)
    (found,) = run_onnx(path, images).values()
    with torch.no_grad():
        expected = levels(images)
    # No value of these images comes so near to a tie that another order of sums moves it.
    assert relative(found, expected) < 1e-4
    assert torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.slow
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
    for target in ("exact", "onnxruntime"):
        export_onnx(q, data.test_images[:2], tmp_path / "model.onnx", target=target)
        (found,) = run_onnx(tmp_path / "model.onnx", data.test_images).values()
        right = float((found.argmax(1) == data.test_labels).float().mean())
        # Rounded biases may move one or two of 360 images over the edge, to either side.
        assert abs(right - accuracy(q, data)) <= 2.5 / len(found)
        assert right > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("extra", [(), (nn.ReLU6(),), (nn.Hardtanh(),), (nn.MaxPool2d(1), nn.Flatten(2))])
def test_every_width_behind_every_kind_of_clamp(bits, extra, tmp_path):
    config = Config(weight_bits=bits, activation_bits=bits, edge_bits=None)
    q, x = ready(small(*extra), config)
    path = tmp_path / "model.onnx"
    levels = written(q, x, path)
    # Beyond the clips too.
    for given in (x, 10 * x):
        out, activations, _ = observed(levels, (given,))
        ours, found = computed(path, (given,), levels_of(activations))
        check_codes(activations, found)
        assert relative(ours, out) < 1e-4
        (whole,) = run_onnx(path, given).values()
        assert relative(whole, out) < 1e-4


@pytest.mark.slow
# Four bits with a free batch are the rows of test_onnxruntime_computes_the_same.
@pytest.mark.parametrize(
    ("bits", "dynamic_batch"), [((8, 8), True), ((8, 8), False), ((4, 8), True), ((4, 8), False), ((4, 4), False)]
)
@pytest.mark.parametrize("name", LANGUAGE)
def test_transformers_of_every_width_with_a_free_and_a_fixed_batch(name, bits, dynamic_batch, tmp_path):
    q, inputs = frozen(LANGUAGE[name], Config(*bits))
    levels = written(q, inputs, tmp_path / "model.onnx", dynamic_batch=dynamic_batch)
    out, activations, _ = observed(levels, inputs)
    ours, found = computed(tmp_path / "model.onnx", inputs, levels_of(activations))
    check_codes(activations, found)
    assert relative(ours, out) < 1e-4


@pytest.mark.slow
def test_ties_go_to_the_even_code(tmp_path):
    model = nn.Sequential(nn.Linear(8, 2)).eval()
    x = torch.arange(-8, 8).reshape(2, 8) + 0.5
    q = freeze(calibrate(quantize(model, x, Config(edge_bits=None)), [x]))
    q.get_submodule("quantizers.0_input").clip.fill_(8)
    path = tmp_path / "model.onnx"
    levels = written(q, x, path)
    _, activations, _ = observed(levels, (x,))
    _, found = computed(path, (x,), levels_of(activations))
    expected = [-8, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 7]
    assert found["quantizers.0_input"][0].flatten().tolist() == expected


@pytest.mark.slow
def test_weights_are_stored_as_integers(tmp_path):
    model = small()
    with torch.no_grad():
        model[1].weight[0], model[1].weight[1], model[0].weight[2] = -2, 0, 0
    q, x = ready(model, Config(edge_bits=None))
    path = tmp_path / "model.onnx"
    levels = written(q, x, path)
    stored, c = initializers(path), convert(q, integers=False)
    for name in ("quantizers.0_weight", "quantizers.4_weight"):
        codes, part = stored[f"{name}.codes"], c.get_submodule(name)
        assert codes.data_type == TensorProto.INT4
        assert tuple(codes.dims) == part.shape
        assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(codes).astype("int8")), part.integers())
        assert (onnx.numpy_helper.to_array(stored[f"{name}.scale"]) != 0).all()
    # The sign of the batch norm's first channel is in the scale, all else of it there and in the bias.
    assert onnx.numpy_helper.to_array(stored["quantizers.0_weight.scale"])[0] < 0
    ops = [node.op_type for node in onnx.load(path).graph.node]
    assert "Mul" not in ops
    assert "BatchNormalization" not in ops
    with torch.no_grad():
        assert relative(next(iter(run_onnx(path, x).values())), levels(x)) < 1e-4


@pytest.mark.slow
def test_the_file_is_standard_small_and_says_nothing_of_this_machine(tmp_path):
    q, x = ready()
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path)
    model = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    onnx.checker.check_model(model, full_check=True)
    assert str(Path(__file__).parent.parent).encode() not in path.read_bytes()
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*dynamic axes will not be renamed:UserWarning")
def test_keyword_inputs_in_another_order_than_that_of_forward(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x, bias=None, mask=None):
            y = self.fc(x) if bias is None else self.fc(x) + bias
            return y if mask is None else y * mask

    example = {"mask": torch.rand(4, 8), "x": torch.randn(4, 8)}
    q = freeze(calibrate(quantize(Masked().eval(), example), [example]))
    export_onnx(q, example, tmp_path / "masked.onnx")
    (found,) = run_onnx(tmp_path / "masked.onnx", example).values()
    # Bound by position, the mask would be what the layer reads. Scales multiply in another order: a few units in the
    # last place of numbers near one.
    torch.testing.assert_close(found, convert(q)(**example), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_an_op_that_onnx_lacks(tmp_path):
    x = torch.randn(2, 4)
    q = freeze(calibrate(quantize(Unsupported().eval(), x), [x]))
    with pytest.raises(OctavError, match=r"cannot write this model as ONNX: .*i0e"):
        export_onnx(q, x, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_older_file_outlives_a_failure(tmp_path):
    x, path = torch.randn(2, 4), tmp_path / "model.onnx"
    path.write_bytes(b"older")
    q = freeze(calibrate(quantize(Unsupported().eval(), x), [x]))
    with pytest.raises(OctavError):
        export_onnx(q, x, path)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


class Detects(nn.Module):
    """Goes by how many scores are large, as detectors do behind their heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        kept = y[y > 0]
        return kept * 2 if len(kept) > 4 else kept


@pytest.mark.slow
def test_what_goes_by_its_data_is_refused_without_pages_of_graph(tmp_path, capsys):
    x = torch.randn(2, 4)
    q = freeze(calibrate(quantize(Detects().eval(), x), [x]))
    with pytest.raises(OctavError, match=r"expression u0 .* export the part before that, such as q\.backbone"):
        export_onnx(q, x, tmp_path / "model.onnx")
    assert capsys.readouterr().err == ""
    # As it says.
    export_onnx(q.body, x, tmp_path / "body.onnx")
    (found,) = run_onnx((tmp_path / "body.onnx").read_bytes(), {"input": x}).values()
    assert torch.equal(found, convert(q.body, integers=False)(x))


def test_paths_that_cannot_be_written(tmp_path):
    q, x = ready()
    with pytest.raises(OctavError, match=r"no_such_folder.model\.onnx cannot be written: No such file or directory"):
        export_onnx(q, x, tmp_path / "no_such_folder" / "model.onnx")
    with pytest.raises(OctavError, match=r"is a folder: give the path of a file"):
        export_onnx(q, x, tmp_path)


def test_targets_that_do_not_exist(tmp_path):
    q, x = ready()
    with pytest.raises(OctavError, match=r"target='tflite': one of 'onnxruntime', "):
        export_onnx(q, x, tmp_path / "model.onnx", target="tflite")
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_not_ready(tmp_path):
    q, x = ready()
    unfreeze(q)
    with pytest.raises(OctavError, match=r"call octav_fx\.calibrate .* octav_fx\.freeze"):
        export_onnx(q, x, tmp_path / "model.onnx")
    q, x = ready()
    with pytest.raises(OctavError, match=r"is torch\.float64, ONNX is written in float32: call q\.float\(\)"):
        export_onnx(q.double(), x.double(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_are_one_tensor_are_refused(tmp_path):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    x = torch.randn(2, 8)
    q = quantize(Adds().eval(), (x, x))
    freeze(calibrate(q, [(x, x)]))
    for inputs, message in (((x, x), "one tensor, and ONNX has no such inputs"), ((x, x.clone()), "the same tensor")):
        with pytest.raises(OctavError, match=message):
            export_onnx(q, inputs, tmp_path / "model.onnx")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.fc(x)
        return y if mask is None else y * mask


class Masked(nn.Module):
    """As models of transformers: a mask of nothing but ones is left out, unless the model is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        given = mask if torch.compiler.is_exporting() or not mask.all() else None
        for block in self.blocks:
            x = block(x, given)
        return x


@pytest.mark.slow
def test_a_mask_that_only_an_export_passes_on_is_in_the_file(tmp_path):
    example = torch.randn(2, 4), torch.ones(2, 4)
    q = freeze(calibrate(quantize(Masked().eval(), example, blocks=[Block]), [example]))
    export_onnx(q, example, tmp_path / "model.onnx")
    # A copy was captured again, and q has the graphs that it had.
    assert [len(module.graphs_of(False)) for module in quantized_modules(q)] == [1, 1]
    assert not torch.compiler.is_exporting() and not torch.compiler.is_compiling()
    # What is led by the calls with a mask computes the integers of these.
    led = led_by_exported_calls(q, example)
    for mask, model in ((torch.ones(3, 4), q), (torch.arange(12.0).view(3, 4) % 2, led)):
        inputs = torch.randn(3, 4), mask
        (found,) = run_onnx(tmp_path / "model.onnx", inputs).values()
        assert torch.equal(found, model(*inputs))


class Cache:
    def __init__(self, values: Tensor) -> None:
        self.values = values


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Cache]:
        y = self.fc(x)
        return y, Cache(y)


def test_an_object_among_the_outputs_is_told(tmp_path):
    x = torch.randn(2, 4)
    q = freeze(calibrate(quantize(Caching().eval(), x), [x]))
    with pytest.raises(OctavError, match=r"Have forward return no Cache; .* use_cache=False is passed"):
        export_onnx(q, x, tmp_path / "model.onnx")


@pytest.mark.slow
def test_an_example_that_the_model_does_not_hold_for_is_refused(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x, mask=None):
            x = self.a(x)
            return x if mask is None else x * mask

    x = torch.randn(2, 8)
    q = quantize(Masked().eval(), x)
    freeze(calibrate(q, [x]))
    for inputs in ((x, torch.zeros(8)), {"x": x, "mask": torch.zeros(8)}):
        with pytest.raises(OctavError, match="argument mask: None at capture, a tensor of 1 axes now"):
            export_onnx(q, inputs, tmp_path / "model.onnx")
    export_onnx(q, x, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "pool",
    [nn.AvgPool2d(2, divisor_override=3), lambda x: nn.functional.avg_pool2d(x, 2, 2, 0, False, True, 3)],
)
def test_a_pool_with_a_divisor_is_told(tmp_path, pool):
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 3), pool

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.conv(x))

    x = torch.randn(1, 3, 6, 6)
    q = freeze(calibrate(quantize(Pooled().eval(), x), [x]))
    with pytest.raises(OctavError, match="leaves out divisor_override"):
        export_onnx(q, x, tmp_path / "model.onnx")


class Twice(nn.Module):
    """One layer reads zeros and something else, as the cell of an LSTM does: its bias is no integer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.tanh(self.a(x - x) + x)) + x


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "exact"])
def test_a_layer_that_reads_zeros_keeps_its_bias(tmp_path, target):
    torch.manual_seed(0)
    x, path = torch.randn(3, 6), tmp_path / "model.onnx"
    q = freeze(calibrate(quantize(Twice().eval(), x, Config(4, 8, edge_bits=4, residual_bits=8)), [x]))
    export_onnx(q, x, path, target=target)
    (found,) = run_onnx(path, (x,)).values()
    with torch.no_grad():
        # onnxruntime puts the bias of the other call on the grid of its sums: a code of 255 moves by one, or two do.
        assert relative(found, q(x)) < 2 / 255


class Axes(nn.Module):
    """Attention of any number of axes, of which PyTorch's exporter knows four."""

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.project, self.mask = nn.Linear(8, 24), mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v, self.mask)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ((6, 8), None),
        ((2, 6, 8), None),
        ((2, 6, 8), (6, 6)),
        ((4, 3, 2, 6, 8), None),
        ((4, 3, 2, 6, 8), (3, 1, 6, 6)),
        ((4, 3, 2, 6, 8), (2, 6, 6)),
    ],
)
def test_attention_of_any_number_of_axes(shape, mask, tmp_path):
    x, path = torch.randn(shape), tmp_path / "model.onnx"
    module = Axes(None if mask is None else torch.randn(mask))
    q = freeze(calibrate(quantize(module.eval(), x), [x]))
    is_free = len(shape) > 2
    export_onnx(q, x, path, dynamic_batch=is_free)
    x = torch.cat([x, x])[1:] if is_free else x
    (found,) = run_onnx(path, x).values()
    with torch.no_grad():
        assert found.shape == q(x).shape
        assert relative(found, q(x)) < 1e-5


class Negative(nn.Module):
    """PyTorch's exporter takes the root of the scale, and writes NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, scale=-0.3)


@pytest.mark.slow
def test_an_attention_with_a_scale_below_zero_is_told(tmp_path):
    x, path = torch.randn(1, 2, 3, 4), tmp_path / "model.onnx"
    q = freeze(calibrate(quantize(Negative().eval(), x, Config(attention="operands")), [x]))
    with pytest.raises(OctavError, match=r"no scale below zero, -0\.3: negate the query"):
        export_onnx(q, x, path)
    q = freeze(calibrate(quantize(Negative().eval(), x, Config(attention="full")), [x]))
    export_onnx(q, x, path, dynamic_batch=False)
    (found,) = run_onnx(path, (x,)).values()
    with torch.no_grad():
        # Sums of floats in other orders.
        assert relative(found, q(x)) < 1e-5


@pytest.mark.slow
def test_the_bias_of_a_matrix_product_is_not_rounded(tmp_path):
    """Inside of a Gemm onnxruntime rounds it to steps of both scales, which moves nearly every row of a 4-bit MLP."""
    layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))
    images = torch.randn(200, 16)
    q = quantize(layers.eval(), images, Config(edge_bits=None))
    freeze(calibrate(q, [images]))
    export_onnx(q, images, tmp_path / "mlp.onnx", target="exact")
    (found,) = run_onnx(tmp_path / "mlp.onnx", images).values()
    moved = (found - q(images)).abs().amax(1) > 1e-5
    # 56 codes in a row, at most 1e-5 of which are ties.
    assert moved.sum() <= 1


class Steps(nn.Module):
    """One layer in several steps, and a last one."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cell(x)[0][:, -1])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["exact", "onnxruntime"])
def test_a_weight_of_eight_bits_that_several_layers_read(tmp_path, target):
    """Without VNNI, with the option that keeps products from saturating, onnxruntime does not load integers of it."""
    torch.manual_seed(0)
    x = torch.randn(3, 3, 8)
    q = quantize(Steps().eval(), x, Config(8, 8, residual_bits=8), recurrent="unrolled")
    freeze(calibrate(q, [x]))
    export_onnx(q, x, tmp_path / "steps.onnx", target=target)
    (found,) = run_onnx(tmp_path / "steps.onnx", x).values()
    # Sigmoid and tanh are onnxruntime's own: a code at a tie may move by one of 255.
    assert relative(found, q(x)) < 1e-2
