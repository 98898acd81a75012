"""OpenVINO: an independent runtime, with a target of its own and an order of rounding of its own."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx import Config, export_onnx
from octav_fx.compat.tensors import has_vnni
from tests.support.deployable_models import (
    WHOLE,
    Case,
    Relative,
    Text,
    frozen,
    images,
    levels_of,
    observed,
    relative,
    rows_of_tokens,
    shortened,
)
from tests.support.given_levels import computed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_vnni(), reason="without VNNI OpenVINO's products of 8 bits saturate: docs/limits.md"),
]

openvino = pytest.importorskip("openvino", reason="a second runtime, which is not installed")
CASES = shortened()


def compiled(model: Path | bytes) -> Any:
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    core = openvino.Core()
    return core.compile_model(core.read_model(model), "CPU", options)


def run(model: Path | bytes, feed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs by name."""
    net = compiled(model)
    found = net({name: value.numpy() for name, value in feed.items()})
    return {name: torch.from_numpy(found[value]) for value in net.outputs for name in value.get_names()}


def only(path: Path, inputs: tuple[Tensor, ...]) -> Tensor:
    names = [value.name for value in onnx.load(path).graph.input]
    (found,) = {id(y): y for y in run(path, dict(zip(names, inputs, strict=True))).values()}.values()
    return found


def kernels(path: Path) -> Counter[tuple[str, str]]:
    """How often a kind of node runs in a precision."""
    details = [op.get_rt_info() for op in compiled(path).get_runtime_model().get_ops()]
    return Counter((info["layerType"].astype(str), info["runtimePrecision"].astype(str)) for info in details)


@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0", "encoder", "vit_b_16"])
def test_layer_by_layer(name, bits, tmp_path):
    q, inputs = frozen(CASES[name], Config(*bits, residual_bits=8))
    path = tmp_path / "model.onnx"
    export_onnx(q, inputs, path, target="openvino")
    out, activations, _ = observed(octav_fx.convert(q, integers=False), inputs)
    ours, found = computed(path, inputs, levels_of(activations), run)
    moved = total = 0
    for key, calls in activations.items():
        for seen, y in zip(calls, found[key], strict=True):
            differs = ((y - seen.y) / seen.step).round().abs()
            assert differs.max() <= 1, key
            moved, total = moved + int(differs.sum()), total + y.numel()
    # At ties alone, as scales are multiplied in another order: 1e-5, and more where two scales have a simple ratio.
    assert moved <= 1e-3 * total
    assert relative(ours, out) < 1e-5


@pytest.mark.parametrize(("name", "bits"), [("resnet18", (8, 8)), ("mobilenet_v2", (4, 8))])
def test_end_to_end(name, bits, tmp_path):
    q, inputs = frozen(CASES[name], Config(*bits, residual_bits=8))
    path = tmp_path / "model.onnx"
    export_onnx(q, inputs, path, target="openvino")
    (x,) = CASES[name].inputs(32)
    with torch.no_grad():
        expected = q(x)
    difference = (only(path, (x,)) - expected).abs().amax(1) / expected.abs().amax(1)
    # A code that moves at a tie moves what is behind it; one of 60 000 does in few images.
    assert (difference < 1e-5).double().mean() > 0.75
    assert difference.max() < 0.1


class Residual(nn.Module):
    """Functions of convolutions, sums of two, and of one and codes."""

    def __init__(self, function: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            nn.Sequential(nn.Conv2d(i, 16, k, s, k // 2), function()) for i, k, s in ((3, 3, 1), (16, 3, 1), (16, 1, 1))
        )
        self.down, self.beside = nn.Conv2d(16, 8, 3, 2, 1), nn.Conv2d(16, 8, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.third(self.second(x))
        return nn.functional.relu(self.down(x) + self.beside(x)).flatten(1)


@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
@pytest.mark.parametrize("function", [nn.ReLU, nn.SiLU, nn.Hardswish, nn.LeakyReLU])
def test_what_a_kernel_goes_on_with_is_rounded(function, bits, tmp_path):
    q, inputs = frozen(Case(lambda: Residual(function), images), Config(*bits, edge_bits=None, residual_bits=8))
    path = tmp_path / "model.onnx"
    export_onnx(q, inputs, path, target="openvino")
    (x,) = images(4)
    with torch.no_grad():
        expected = q(x)
    differs = (only(path, (x,)) - expected).abs() > 1e-5 * expected.abs().max()
    # What ties move; without the rounding before a sum, a third.
    assert differs.double().mean() < 0.05
    found = kernels(path)
    assert found["Convolution", "u8"] + found["Convolution", "i8"] == 5, found
    # Nothing stands between them: neither functions nor zero points.
    assert not {kind for kind, _ in found} & {"Eltwise", "Subgraph", "Subtract", "Convert", "Swish"}, found


def test_a_pool_and_a_transpose_move_bytes(tmp_path):
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(3, 16, 3), nn.Linear(16, 16), nn.Linear(16, 16)
            self.pool = nn.MaxPool2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(self.conv(x).relu()).flatten(2).transpose(1, 2)
            return self.second(self.first(x).transpose(0, 1))

    q, (x,) = frozen(Case(Moved, images), Config(8, 8, edge_bits=None))
    path = tmp_path / "model.onnx"
    export_onnx(q, (x,), path, target="openvino")
    found = kernels(path)
    assert found["Pooling", "u8"] == 1 and found["Transpose", "i8"] + found["Transpose", "u8"] == 2, found
    with torch.no_grad():
        # A few codes at ties.
        assert relative(only(path, (x,)), q(x)) < 0.05


@pytest.mark.parametrize("is_free", [True, False])
@pytest.mark.parametrize("attention", ["operands", "full"])
def test_an_attention_is_one_kernel_between_layers(attention, is_free, tmp_path):
    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(64, 2, 64, dropout=0.0, batch_first=True)

    def inputs(batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 8, 64),)

    q, (x,) = frozen(Case(layer, inputs), Config(8, 8, edge_bits=None, attention=attention))
    path = tmp_path / "model.onnx"
    export_onnx(q, (x,), path, target="openvino", dynamic_batch=is_free)
    found = kernels(path)
    # Queries, keys, values, the output, and the two of the feed-forward part; both products of the attention.
    assert found["FullyConnected", "i8"] + found["FullyConnected", "u8"] == 6, found
    assert found["Subgraph", "i8"] == 1 and not {kind for kind, _ in found} & {"MatMul", "Softmax", "Gather"}, found
    with torch.no_grad():
        assert relative(only(path, (x,)), q(x)) < 0.02


def test_chunks_of_a_projection_are_layers(tmp_path):
    q, inputs = frozen(Case(Text, rows_of_tokens), Config(8, 8, edge_bits=None))
    path = tmp_path / "model.onnx"
    export_onnx(q, inputs, path, target="openvino")
    found = kernels(path)
    # Of the first layer six, of the second three, and the head.
    assert found["FullyConnected", "i8"] + found["FullyConnected", "u8"] == 10, found
    assert not {kind for kind, _ in found} & {"Split", "MatMul"}, found
    with torch.no_grad():
        assert relative(only(path, inputs), q(*inputs)) < 0.02


def test_a_small_norm_has_its_eps(tmp_path):
    """OpenVINO takes a scale for one that no norm sees; here eps is more than the variance."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
            nn.init.normal_(self.first.weight, 0, 1e-3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x) + 1e-3 * x
            return y + self.second(self.norm(y))

    def inputs(batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 5, 8),)

    q, x = frozen(Case(Normed, inputs), Config(8, 8, edge_bits=None, residual_bits=8))
    path = tmp_path / "model.onnx"
    export_onnx(q, x, path, target="openvino")
    with torch.no_grad():
        # One code at a tie, of 8 bits; without eps it is several times as much as the values are.
        assert relative(only(path, x), q(*x)) < 0.02


class Largest(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.fc, self.how = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.how == "rows":
            return self.fc(x.flatten(2).mT.max(1).values)
        return self.fc(x.amax((2, 3)) if self.how == "amax" else x.amin((2, 3)))


@pytest.mark.parametrize("how", ["amax", "amin", "rows"])
def test_codes_of_the_largest(how, tmp_path):
    q, inputs = frozen(Case(lambda: Largest(how), images), Config(8, 8, edge_bits=None))
    path = tmp_path / "model.onnx"
    export_onnx(q, inputs, path, target="openvino")
    (x,) = images(4)
    with torch.no_grad():
        difference = (only(path, (x,)) - q(x)).abs().amax(1) / q(x).abs().amax(1)
    # A code at a tie may move.
    assert (difference < 1e-5).double().mean() > 0.5
    assert difference.max() < 0.1


@pytest.mark.parametrize("target", ["onnxruntime", "exact"])
def test_it_reads_the_files_for_others(target, tmp_path):
    q, inputs = frozen(WHOLE["encoder"], Config(4, 8, residual_bits=8))
    path = tmp_path / "model.onnx"
    export_onnx(q, inputs, path, target=target)
    with torch.no_grad():
        # Not all roundings are made: some steps of 8 bits.
        assert relative(only(path, inputs), q(*inputs)) < 0.05


def test_a_stack_of_matrices_with_a_scale_for_each_column(tmp_path):
    """Its plugin fails on codes that have one."""
    x, path = torch.randn(2, 6, 8), tmp_path / "model.onnx"
    q = octav_fx.freeze(octav_fx.calibrate(octav_fx.quantize(Relative().eval(), x, Config(7, 7)), [x]))
    export_onnx(q, x, path, target="openvino")
    with torch.no_grad():
        assert relative(only(path, (x,)), q(x)) < 1e-5


class Middle(nn.Module):
    """What lies between two convolutions, of which the second has a third behind it."""

    def __init__(self, middle: Callable[["Middle", Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.eight, self.middle = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1), middle
        self.norm, self.second, self.third = nn.GroupNorm(4, 16), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.middle(self, self.first(x))))


MIDDLES: dict[str, Callable[[Middle, Tensor], Tensor]] = {
    "norm, pool": lambda m, x: F.max_pool2d(m.norm(x), 2),
    "norm, function, pool": lambda m, x: F.max_pool2d(F.gelu(m.norm(x)), 2),
    "norm, sum, pool": lambda m, x: F.max_pool2d(m.norm(x) + x, 2),
    "concatenation": lambda m, x: torch.cat([m.eight(x), m.eight(F.gelu(x))], 1),
    "concatenation of parts": lambda m, x: torch.cat([x[:, 8:], x[:, :8]], 1),
    "concatenation, pool": lambda m, x: F.max_pool2d(torch.cat([x[:, 8:], x[:, :8]], 1), 2),
    "concatenation, function, pool": lambda m, x: F.max_pool2d(F.gelu(torch.cat([x[:, 8:], x[:, :8]], 1)), 2),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_signed_codes_behind_norms_and_concatenations(name, tmp_path):
    """Its plugin writes others, tens of percent off, in the kernel of a norm, and behind a concatenation."""
    x, path = torch.randn(2, 3, 12, 12), tmp_path / "model.onnx"
    q = octav_fx.quantize(Middle(MIDDLES[name]).eval(), x, Config(8, 8, edge_bits=None))
    q = octav_fx.freeze(octav_fx.calibrate(q, [x]))
    export_onnx(q, x, path, target="openvino")
    with torch.no_grad():
        # A code at a tie.
        assert relative(only(path, (x,)), q(x)) < 0.01
