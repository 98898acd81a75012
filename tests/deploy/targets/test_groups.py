"""Weights in groups as ONNX files: blocks of opset 21. What ONNX cannot say is refused."""

import dataclasses
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import octav_fx
from octav_fx import Config, OctavError, quantize
from octav_fx.deploy.runtimes import onnx_session, run_onnx

pytestmark = pytest.mark.slow


def frozen(config: Config) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    q = quantize(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5)), x, config)
    octav_fx.calibrate(q, [x])
    return octav_fx.freeze(q).eval(), x


@pytest.mark.parametrize(
    ("target", "bits", "kind"),
    [
        ("exact", 4, onnx.TensorProto.INT4),
        ("exact", 8, onnx.TensorProto.INT8),
        ("onnxruntime", 8, onnx.TensorProto.INT8),
    ],
)
@pytest.mark.parametrize("activation_bits", [None, 8])
def test_weights_in_groups_are_blocks(target: str, bits: int, kind: int, activation_bits: int | None, tmp_path: Path):
    path = tmp_path / "model.onnx"
    q, x = frozen(
        Config(
            bits, activation_bits, None, weight_granularity="group-32", scale_format="float16", signed_activations=True
        )
    )
    octav_fx.export_onnx(q, x, path, target=target)
    model = onnx.load(path)
    blocks = [n for n in model.graph.node if any(a.name == "block_size" and a.i == 32 for a in n.attribute)]
    assert len(blocks) == 2
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {types[n.input[0]] for n in blocks} == {kind}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    # The same levels; 64 products of magnitude one are summed in another order.
    torch.testing.assert_close(torch.from_numpy(found), q(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "activation_bits"), [(4, None), (3, None), (4, 8)])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_onnxruntime_reads_groups_of_four_bits(bits, activation_bits, rank, dynamic_batch, tmp_path: Path):
    path, optimized = tmp_path / "model.onnx", tmp_path / "optimized.onnx"
    torch.manual_seed(0)
    x = torch.randn(3, *[7] * (rank - 2), 64)
    config = Config(bits, activation_bits, None, weight_granularity="group-32", signed_activations=True)
    q = quantize(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5, bias=False)), x, config)
    octav_fx.freeze(octav_fx.calibrate(q, [x])).eval()
    octav_fx.export_onnx(q, x, path, dynamic_batch=dynamic_batch)
    onnx_session(path, 1, optimized)
    assert [n.op_type for n in onnx.load(optimized).graph.node].count("MatMulNBits") == 2
    (found,) = run_onnx(path, x).values()
    # The same levels; 64 products of magnitude one are summed in another order.
    torch.testing.assert_close(found, q(x), rtol=1e-4, atol=1e-4)


def test_blocks_that_onnxruntime_has_no_kernel_for(tmp_path: Path):
    torch.manual_seed(0)
    x = torch.randn(3, 24)
    # Blocks of 8 and of 24.
    for size in (8, 24):
        q = quantize(nn.Sequential(nn.Linear(24, 5)), x, Config(4, None, None, weight_granularity=f"group-{size}"))
        octav_fx.freeze(octav_fx.calibrate(q, [x])).eval()
        octav_fx.export_onnx(q, x, tmp_path / "model.onnx")
        assert "MatMulNBits" not in {n.op_type for n in onnx.load(tmp_path / "model.onnx").graph.node}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(edge_bits=None, weight_format="e2m1"), "_weight: ONNX has no levels of e2m1; .* by an override"),
        (Config(edge_bits=None, activation_granularity="token"), "_input: ONNX has no op that rounds to int4/token.1"),
        (Config(edge_bits=None, activation_format="e4m3"), "_input: ONNX has no op that rounds to e4m3/tensor"),
    ],
)
def test_what_onnx_cannot_say(config: Config, message: str, tmp_path: Path):
    q, x = frozen(config)
    with pytest.raises(OctavError, match=message):
        octav_fx.export_onnx(q, x, tmp_path / "model.onnx", target="exact")
    assert not list(tmp_path.iterdir())
    # The way out that the message names.
    plain = {"weight_format": "int", "activation_format": "int", "activation_granularity": "tensor"}
    q, x = frozen(dataclasses.replace(config, overrides={"*": plain}))
    octav_fx.export_onnx(q, x, tmp_path / "model.onnx", target="exact")


def test_what_is_deployed_counts_codes_and_scales(tmp_path: Path) -> None:
    q, x = frozen(Config(edge_bits=None, activation_bits=None, weight_granularity="group-32"))
    found = octav_fx.deployment(q, x)
    (row,) = (row for row in found.rows if (row.node, row.operand) == ("0", "weight"))
    # Two codes to a byte, and a float32 for each group of 32.
    assert (row.bits, row.bytes) == (4, 64 * 32 // 2 + 64 * 32 // 32 * 4)
    assert found.converted_difference == 0
