"""Each example runs as it stands, and shows what it says."""

import os
import socket
from pathlib import Path

import onnx
import pytest
import torch
import torch.multiprocessing as mp

import octav_fx
from examples import ddp, deploy_onnx, mixed_bits, own_op, quickstart

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_quickstart(capsys):
    in_float, before, after = quickstart.main(steps=120)
    # A hundred steps are few; what is lost by 4 bits is little, and comes back.
    assert in_float > 0.9 and after > 0.9
    assert after >= before - 0.02
    said = capsys.readouterr().out
    assert "quantized: 100.00% of 7.69 M MACs" in said
    assert f"{in_float:.1%} in float, {before:.1%} at 4 bits, {after:.1%} at 4 bits and trained" in said


def test_own_op_has_levels_of_four_bits(capsys, monkeypatch):
    q = own_op.main()
    said = capsys.readouterr().out
    without, _, with_rule = said.partition("\nWith it:\n")
    assert "fft_conv" not in without and "fft_conv  fft_conv  w" in with_rule
    bits = {(row.node, row.operand): row.bits for row in octav_fx.rows(q)}
    assert bits["fft_conv", "x"] == bits["fft_conv", "w"] == 4
    seen = []
    for name, module in q.named_modules():
        if name in ("quantizers.fft_conv_x", "quantizers.fft_conv_w"):
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    q(torch.randn(4, 8, 64))
    activation, weight = seen
    assert len(activation.unique()) <= 16
    assert all(len(filter_.unique()) <= 16 for filter_ in weight)


@pytest.mark.slow
def test_mixed_bits_gives_few_bits_to_the_layers_that_mind_least(capsys):
    config = mixed_bits.main(steps=120)
    minds = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("layer "):
            _, layer, *_, rise = line.split()
            minds[layer] = float(rise)
    assert len(minds) == 5
    few = set(config.overrides)
    assert len(few) == 2
    assert max(minds[layer] for layer in few) <= min(minds[layer] for layer in minds.keys() - few)


@pytest.mark.slow
def test_deploy_onnx(tmp_path):
    found = deploy_onnx.main(tmp_path / "model.onnx")
    # Linear layers round once, as the frozen model; at a tie, where none of these lies, other CPUs move a code.
    assert found.converted_difference < 1e-6
    assert abs(found.onnx_difference - found.converted_difference) < 1e-5
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators


def rank_of_ddp(rank: int, runs: list[tuple[int, list[str]]]) -> None:
    """What torchrun does for a process, for several runs one after the other: importing takes longest."""
    torch.set_num_threads(1)
    for port, arguments in runs:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        ddp.main(arguments)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def plain(values: dict) -> dict:
    return {name: torch.as_tensor(value).tolist() for name, value in values.items()}


@pytest.mark.ranks
def test_ddp_goes_on_to_the_same_weights(tmp_path):
    runs = [("whole", 6), ("parts", 4), ("parts", 6)]
    arguments = [(free_port(), [str(tmp_path / name), "--steps", str(steps)]) for name, steps in runs]
    mp.spawn(rank_of_ddp, (arguments,), nprocs=2)
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 6
    assert all(torch.equal(parts["model"][name], value) for name, value in whole["model"].items())
    ddp.net().load_state_dict(whole["model"], strict=True)
    # Each rank has met other images, and its quantizers remember it.
    assert len(whole["extra"]) == 2
    for rank, extra in enumerate(whole["extra"]):
        for name, values in extra.items():
            for key, value in values.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(parts["extra"][rank][name][key])), (
                    name,
                    key,
                )


def test_no_example_imports_the_benchmarks_or_the_tests():
    sources = {path: path.read_text() for path in (ROOT / "examples").rglob("*.py")}
    assert len(sources) > 10
    for path, source in sources.items():
        assert "benchmarks" not in source and "from tests" not in source, path
