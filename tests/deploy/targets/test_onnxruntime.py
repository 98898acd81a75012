"""The target "onnxruntime": its kernels are integer ones, and it computes convert(q, integers=False), bit for bit."""

import functools
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

import octav_fx
from octav_fx import Config, calibrate, export_onnx, freeze, quantize
from octav_fx.deploy.runtimes import run_onnx
from tests.support.deployable import trained
from tests.support.deployable_models import Relative, frozen, images, levels_of, observed, relative, shortened
from tests.support.given_levels import computed
from tests.support.onnx_files import optimized_ops, ready, small

pytestmark = pytest.mark.slow

CASES = shortened()
BITS = [(8, 8), (4, 8), (4, 4)]

# The definition, which onnxruntime's kernels compute; oneDNN's round in another order.
convert = functools.partial(octav_fx.convert, integers=False)


def only(outputs: dict[str, Tensor]) -> Tensor:
    (found,) = outputs.values()
    return found


@pytest.mark.parametrize(("bits", "dynamic_batch"), [*((bits, True) for bits in BITS), ((4, 4), False)])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "branches"])
def test_the_whole_model_bit_for_bit(name, bits, dynamic_batch, tmp_path):
    q, inputs = frozen(CASES[name], Config(*bits, residual_bits=8))
    path = tmp_path / "model.onnx"
    export_onnx(q, inputs, path, dynamic_batch=dynamic_batch)
    ops = optimized_ops(path)
    # Every convolution, sum, pool and linear layer, and nothing of them in float.
    convolutions = sum(isinstance(part, nn.Conv2d) for part in q.modules())
    assert ops["QLinearConv"] == convolutions
    assert ops["QGemm"] == ops["QLinearGlobalAveragePool"] == 1
    assert not set(ops) & {"Conv", "FusedConv", "Gemm", "Add", "Relu", "Mul", "ReduceMean", "GlobalAveragePool"}
    has_sums = name != "branches"
    assert (ops["QLinearAdd"] > 0) == has_sums
    # One at the input; where a sum has a narrower reader, another; where codes are concatenated, those of their parts.
    assert ops["QuantizeLinear"] == 1 or bits[1] < 8 or not has_sums
    # 256 inputs; some beyond the clips.
    batches = [images(85)[0], 3 * images(170)[0], torch.zeros(1, 3, 32, 32)] if dynamic_batch else [*inputs]
    for x in batches:
        with torch.no_grad():
            assert torch.equal(only(run_onnx(path, x)), q(x))


@pytest.mark.parametrize(("bits", "dynamic_batch"), [*((bits, True) for bits in BITS), ((4, 4), False)])
@pytest.mark.parametrize("name", ["encoder", "gpt", "vit_b_16", "mobilenet_v3", "efficientnet_b0", "swin_t"])
def test_layer_by_layer_bit_for_bit(name, bits, dynamic_batch, tmp_path):
    q, inputs = frozen(CASES[name], Config(*bits, residual_bits=8))
    path = tmp_path / "model.onnx"
    export_onnx(q, inputs, path, dynamic_batch=dynamic_batch)
    out, activations, _ = observed(convert(q), inputs)
    ours, found = computed(path, inputs, levels_of(activations))
    moved = total = 0
    for key, calls in activations.items():
        for seen, y in zip(calls, found[key], strict=True):
            moved += int((seen.y != y).sum())
            total += y.numel()
    # Between integers stand functions that no two runtimes round alike (GELU, SiLU, layer norm, softmax).
    assert moved <= 1e-4 * total
    assert relative(ours, out) < 1e-5
    if dynamic_batch:
        inputs = CASES[name].inputs(256)
        with torch.no_grad():
            same = only(run_onnx(path, inputs)).argmax(-1) == q(*inputs).argmax(-1)
        assert same.double().mean() >= 0.995
    ops = optimized_ops(path)
    # The last is slow.
    assert not set(ops) & {"Gemm", "ConvTranspose", "SkipLayerNormalization"}
    linears = sum(isinstance(part, nn.Linear) for part in q.modules())
    if name in ("encoder", "vit_b_16"):
        # Attention's projection of three is a linear layer of no module.
        assert ops["QGemm"] == linears + (2 if name == "vit_b_16" else 0)
        # In a fused attention q is scaled behind its quantizer, and the output of softmax has none.
        assert ops["MatMul"] + ops["FusedMatMul"] == (4 if name == "vit_b_16" else 0)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize(
    "extra",
    [(), (nn.ReLU6(),), (nn.Hardtanh(-0.5, 0.7),), (nn.MaxPool2d(1), nn.Flatten(2))],
)
def test_every_width_behind_every_kind_of_clamp(bits, extra, tmp_path):
    q, x = ready(small(*extra), Config(bits, bits, edge_bits=None))
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path)
    ops = optimized_ops(path)
    assert ops["QLinearConv"] == ops["QGemm"] == 1
    c = convert(q)
    # Beyond the clips too, and another batch.
    for given in (x, 10 * x, torch.randn(7, 3, 8, 8)):
        assert torch.equal(only(run_onnx(path, given)), c(given))


@pytest.mark.parametrize("bits", BITS)
def test_depthwise_grouped_strided_padded_and_factors_of_both_signs(bits, tmp_path):
    layers = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), trained(nn.BatchNorm2d(8)), nn.ReLU6()),
        *(nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), trained(nn.BatchNorm2d(8)), nn.ReLU6()),
        *(nn.Conv2d(8, 12, 3, dilation=2, groups=4), trained(nn.BatchNorm2d(12))),
        *(nn.Conv2d(12, 6, 1), nn.Flatten(), nn.Linear(96, 5), nn.ReLU(), nn.Linear(5, 3)),
    ).eval()
    x = torch.randn(4, 3, 16, 16)
    q = freeze(calibrate(quantize(layers, x, Config(*bits)), [x]))
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path)
    assert optimized_ops(path)["QLinearConv"] == 4
    assert torch.equal(only(run_onnx(path, x)), convert(q)(x))


@pytest.mark.parametrize("shape", [(2, 3, 20), (2, 3, 6, 6, 6)])
def test_one_and_three_dimensions(shape, tmp_path):
    conv = nn.Conv1d if len(shape) == 3 else nn.Conv3d
    x = torch.randn(shape)
    layers = nn.Sequential(conv(3, 4, 3), nn.ReLU(), conv(4, 3, 3, padding=1), nn.Flatten(), nn.LazyLinear(2)).eval()
    layers(x)
    q = freeze(calibrate(quantize(layers, x), [x]))
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path)
    assert optimized_ops(path)["QLinearConv"] == 2
    assert torch.equal(only(run_onnx(path, x)), convert(q)(x))


def test_the_file_stores_four_bits(tmp_path):
    q, x = ready(config=Config(edge_bits=None))
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path)
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    c = convert(q)
    for layer in (0, 4):
        codes, weight = stored[f"quantizers.{layer}_weight.codes"], c.get_submodule(f"quantizers.{layer}_weight")
        assert codes.data_type == TensorProto.INT4
        assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(codes).astype("int8")), weight.integers())
        assert stored[f"quantizers.{layer}_bias.codes"].data_type == TensorProto.INT32
    onnx.checker.check_model(onnx.load(path), full_check=True)


class Shared(nn.Module):
    """One convolution called twice: its weight has no scale of one input alone, and stays in float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 1), nn.Linear(48, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.conv(x)).flatten(1))


def test_what_stays_in_float_is_exact_too(tmp_path):
    x = torch.randn(2, 3, 4, 4)
    q = freeze(calibrate(quantize(Shared().eval(), x, Config(edge_bits=None)), [x]))
    path: Path = tmp_path / "model.onnx"
    export_onnx(q, x, path)
    assert optimized_ops(path)["QLinearConv"] == 0
    assert relative(only(run_onnx(path, x)), convert(q)(x)) < 1e-5


class Cross(nn.Module):
    """Attention to other positions, where torch takes the weight of its projections apart: no weight, but computed."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.attention(x, other, other)[0]


def test_a_weight_that_is_computed_has_a_scale_for_each_channel(tmp_path):
    inputs = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    q = freeze(calibrate(quantize(Cross().eval(), inputs), [inputs]))
    path = tmp_path / "model.onnx"
    export_onnx(q, inputs, path)
    with torch.no_grad():
        assert relative(only(run_onnx(path, inputs)), q(*inputs)) < 1e-5


@pytest.mark.parametrize("target", ["onnxruntime", "exact"])
def test_a_stack_of_matrices_with_a_scale_for_each_column(target, tmp_path):
    x = torch.randn(2, 6, 8)
    q = freeze(calibrate(quantize(Relative().eval(), x, Config(8, 8)), [x]))
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path, target=target)
    with torch.no_grad():
        assert relative(only(run_onnx(path, x)), q(x)) < 1e-5


def test_silu_between_convolutions(tmp_path):
    """One node of floats between integer kernels, which gives the same codes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SiLU(inplace=True), nn.Conv2d(8, 8, 3, groups=8), nn.SiLU(), nn.Conv2d(8, 4, 1)
    )
    x = torch.randn(4, 3, 12, 12)
    q = freeze(calibrate(quantize(net.eval(), x, Config(8, 8, residual_bits=8)), [x]))
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path)
    ops = optimized_ops(path)
    assert ops["QuickGelu"] == ops["QLinearConv"] == 2
    assert not set(ops) & {"Sigmoid", "Mul"}
    # The last convolution sums eight floats in another order; a moved code would be a hundred times as far.
    torch.testing.assert_close(only(run_onnx(path, x)), convert(q)(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_around_images_are_padding_of_integer_convolutions(bits, tmp_path):
    layers = [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2), nn.ReLU6(), nn.ConstantPad2d((1, 2, 0, 1), 0.0)]
    layers += [nn.Conv2d(8, 8, 3, 2, groups=8), nn.ReLU(), nn.ZeroPad2d(1), nn.Conv2d(8, 4, 3), nn.Flatten()]
    x = torch.randn(4, 3, 13, 13)
    q = freeze(calibrate(quantize(nn.Sequential(*layers).eval(), x, Config(*bits)), [x]))
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path)
    ops = optimized_ops(path)
    # The last has a float result.
    assert ops["QLinearConv"] == 2 and ops["Conv"] == 1
    assert not set(ops) & {"Pad", "FusedConv"}
    for batch in (x, 3 * torch.randn(5, 3, 13, 13)):
        with torch.no_grad():
            # Sums of 72 levels, rounded to float32; a code that moved would be a hundredth.
            assert relative(only(run_onnx(path, batch)), q(batch)) < 72 * 2**-24


def test_zeros_that_a_clamp_behind_them_leaves_out(tmp_path):
    layers = [nn.Conv2d(3, 8, 3), nn.ZeroPad2d(1), nn.Hardtanh(0.1, 0.4), nn.Conv2d(8, 4, 3)]
    x = torch.randn(2, 3, 9, 9)
    q = freeze(calibrate(quantize(nn.Sequential(*layers).eval(), x, Config(4, 8)), [x]))
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path)
    with torch.no_grad():
        assert relative(only(run_onnx(path, x)), q(x)) < 72 * 2**-24


@pytest.mark.parametrize("target", ["onnxruntime", "exact"])
@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2)])
@pytest.mark.parametrize("size", [1, 2])
def test_zeros_before_a_pool_are_not_its_padding(size, pool, target, tmp_path):
    # All below zero, so that a zero is the largest; and zeros as many as the window is long.
    layers = [nn.Conv2d(3, 8, 3), nn.Hardtanh(-0.4, -0.1), nn.ZeroPad2d(size), pool, nn.Conv2d(8, 4, 3)]
    x = torch.randn(2, 3, 9, 9)
    q = freeze(calibrate(quantize(nn.Sequential(*layers).eval(), x, Config(4, 8)), [x]))
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path, target=target)
    with torch.no_grad():
        # Another order of additions may move a code of an average at a tie.
        assert relative(only(run_onnx(path, x)), q(x)) < 0.05


def test_zeros_that_are_returned(tmp_path):
    x, path = torch.randn(2, 3, 9, 9), tmp_path / "model.onnx"
    q = freeze(calibrate(quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ZeroPad2d(1)).eval(), x, Config(4, 8)), [x]))
    export_onnx(q, x, path)
    with torch.no_grad():
        assert relative(only(run_onnx(path, x)), q(x)) < 27 * 2**-24


def test_zeros_before_a_pool_of_what_is_not_below_zero_are_its_padding(tmp_path):
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ZeroPad2d(1), nn.MaxPool2d(3, 2), nn.Conv2d(8, 4, 3)]
    x = torch.randn(2, 3, 13, 13)
    q = freeze(calibrate(quantize(nn.Sequential(*layers).eval(), x, Config(4, 8)), [x]))
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path)
    assert "Pad" not in optimized_ops(path)
    with torch.no_grad():
        assert relative(only(run_onnx(path, x)), q(x)) < 72 * 2**-24


def test_convolutions_write_codes_that_are_concatenated(tmp_path):
    class Fire(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.squeeze, self.one, self.three = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1)
            self.last = nn.Conv2d(12, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.squeeze(x).relu()
            x = torch.cat([self.one(x).relu(), self.three(x).relu()], 1)
            return self.last(nn.functional.max_pool2d(x, 3, 2)).relu().mean((2, 3))

    inputs = images()
    q = quantize(Fire().eval(), inputs, Config(4, 4, edge_bits=None, residual_bits=8))
    freeze(calibrate(q, [inputs]))
    path = tmp_path / "model.onnx"
    export_onnx(q, inputs, path)
    ops = optimized_ops(path)
    assert ops["QLinearConv"] == 4
    assert ops["QuantizeLinear"] == 1
    x = images(64)[0]
    with torch.no_grad():
        # The last mean is one of floats, in an order of the runtime's own.
        torch.testing.assert_close(only(run_onnx(path, x)), q(x), rtol=1e-6, atol=0)
