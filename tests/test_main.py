"""python -m octav_fx: what it prints, and errors without a traceback."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octav_fx
from octav_fx import demo, quantize, table
from octav_fx.__main__ import main
from octav_fx.deploy.runtimes import run_onnx
from octav_fx.reporting.measure import sqnr_of

ROOT = Path(__file__).parent.parent


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "octav_fx", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_help_names_the_commands():
    shown = command("--help")
    assert shown.returncode == 0
    assert "demo" in shown.stdout
    assert "table" in shown.stdout
    assert shown.stderr == ""


@pytest.mark.slow
def test_errors_have_no_traceback():
    shown = command("table", "no_such_module:build")
    assert (shown.returncode, shown.stdout) == (1, "")
    assert shown.stderr == "octav_fx: no model 'no_such_module:build': No module named 'no_such_module'\n"


def test_table_of_a_callable(capsys):
    assert main(["table", "tests.test_main:tiny", "--input", "2x8", "--weight-bits", "3", "--clip", "max"]) == 0
    out = capsys.readouterr().out
    # Four operands, two of each layer; the last linear has 8 bits.
    assert [line.split()[5] for line in out.splitlines()[3:7]] == ["int4", "int3", "uint8", "int8"]
    assert out.endswith("quantized: 100.00% of 80 MACs\n")
    # Seeded, and in eval mode: the same again.
    main(["table", "tests.test_main:tiny", "--input", "2x8", "--weight-bits", "3", "--clip", "max"])
    assert capsys.readouterr().out == out


def test_table_is_the_librarys(capsys):
    assert main(["table", "tests.test_main:tiny", "--input", "2x8"]) == 0
    torch.manual_seed(0)
    model = tiny().eval()
    assert capsys.readouterr().out == table(quantize(model, torch.randn(2, 8))) + "\n"


@pytest.mark.slow
def test_table_of_a_torchvision_name(capsys):
    assert main(["table", "squeezenet1_1", "--input", "1x3x32x32", "--activation-bits", "5"]) == 0
    out = capsys.readouterr().out
    assert "features.3.expand3x3" in out
    assert "quantized: 100.00% of" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_model"], "torchvision has no model 'no_such_model'"),
        (["os:getcwd"], "os:getcwd returned str, not an nn.Module"),
        (["tests.test_main:tiny", "--input", "2xa"], "--input 2xa: sizes joined by x, as in 1x3x224x224"),
        (["tests.test_main:tiny", "--input", "2x7"], "capture stopped at"),
        (["tests.test_main:tiny", "--weight-bits", "9"], "weight_bits=9: whole bits from 2 to 8"),
        (["tests.test_main:tiny", "--clip", "none"], "clip='none': one of 'octav', 'octav-grid', 'octav-tight', 'max'"),
    ],
)
def test_exit_code_and_message_of_errors(arguments, message, capsys):
    assert main(["table", *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"octav_fx: {message}" in shown.err


@pytest.mark.parametrize("arguments", [[], ["no_such_command"], ["table"], ["table", "tiny", "--bits", "4"]])
def test_a_wrong_call_prints_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert "usage: octav-fx" in capsys.readouterr().err


def with_inputs() -> tuple[nn.Module, Any]:
    """A model that brings its own inputs."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), torch.randn(2, 1, 6, 6)


class Counting(nn.Module):
    """Counts its calls, so that it runs its own Python over quantized layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.calls = nn.Linear(8, 8), nn.Linear(8, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.two(self.one(x).relu())


def batches() -> list[tuple[Tensor, Tensor]]:
    """Images with labels, as a DataLoader gives them."""
    return [(torch.randn(2, 1, 6, 6), torch.zeros(2, dtype=torch.long)) for _ in range(3)]


def test_version(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["--version"])
    assert exited.value.code == 0
    assert capsys.readouterr().out == f"octav_fx {octav_fx.__version__}, torch {torch.__version__}\n"


def test_table_as_data(capsys):
    arguments = ["table", "tests.test_main:with_inputs", "--sort=-sqnr", "--override", "0=3"]
    assert main([*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert len(values) == 4 and [value["sqnr"] for value in values] == sorted((v["sqnr"] for v in values), reverse=True)
    assert {value["bits"] for value in values if value["node"] == "0"} == {3}
    assert main([*arguments, "--csv", "--filter", "0"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["node"] for line in lines] == ["0", "0"]


def test_report_is_written(tmp_path, capsys):
    pytest.importorskip("plotly")
    path = tmp_path / "out.html"
    assert main(["report", "tests.test_main:with_inputs", "-o", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: open it in a browser\n"
    assert "<title>tests.test_main:with_inputs: octav_fx report</title>" in path.read_text()


def test_config_as_json_and_file(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"weight_bits": 2, "edge_bits": None, "clip": "max"}))
    for given in (str(path), path.read_text()):
        assert main(["table", "tests.test_main:tiny", "--input", "2x8", "--config", given, "--weight-bits", "5"]) == 0
        formats = [line.split()[5] for line in capsys.readouterr().out.splitlines()[3:7]]
        assert formats == ["int4", "int5", "uint4", "int5"]


def test_a_preset_and_what_is_laid_over_it(capsys):
    arguments = ["table", "tests.test_main:tiny", "--input", "2x8", "--preset", "w8a8", "--edge-bits", "5", "--json"]
    assert main(arguments) == 0
    assert [value["bits"] for value in json.loads(capsys.readouterr().out)] == [8, 8, 5, 5]
    assert main(["table", "tests.test_main:tiny", "--input", "2x8", "--preset", "w9a9"]) == 1
    assert "octav_fx: " in capsys.readouterr().err


def test_weights_are_loaded(tmp_path, capsys):
    torch.manual_seed(7)
    model, path = tiny(), tmp_path / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "step": 3}, path)
    assert main(["table", "tests.test_main:tiny", "--input", "2x8", "--weights", str(path), "--csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert float(lines[1]["max_abs"]) == float(model[0].weight.abs().max())


@pytest.mark.slow
def test_quantize_writes_a_file_of_eight_bits(tmp_path, capsys):
    path, state = tmp_path / "model.onnx", tmp_path / "state.pt"
    data = ["--data", "tests.test_main:batches"]
    assert main(["quantize", "tests.test_main:with_inputs", *data, "--onnx", str(path), "--state", str(state)]) == 0
    shown = capsys.readouterr()
    assert "100.00% of the multiply-accumulates are quantized" in shown.out and "random inputs" not in shown.err
    # What was frozen is a state that export takes, with the clips in it.
    again = tmp_path / "again.onnx"
    bits = ["--weight-bits", "8", "--activation-bits", "8", "--residual-bits", "8"]
    assert main(["export", "tests.test_main:with_inputs", *bits, "--weights", str(state), "--onnx", str(again)]) == 0
    shown = capsys.readouterr()
    assert "onnxruntime" in shown.out and "random inputs" not in shown.err
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_export_of_a_model_in_parts(tmp_path, capsys):
    path, weights = tmp_path / "model.onnx", tmp_path / "weights.pt"
    torch.manual_seed(7)
    trained, x = Counting(), torch.randn(64, 8)
    torch.save(trained.state_dict(), weights)
    model = ["tests.test_main:Counting", "--input", "64x8", "--weight-bits", "8", "--activation-bits", "8"]
    assert main(["export", *model, "--weights", str(weights), "--onnx", str(path)]) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()[2:6]]
    assert [line[:3] for line in lines] == [[node, of, "8"] for node in ("one", "two") for of in ("input", "weight")]
    assert "converted 0.0e+00, onnxruntime 0.0e+00" in shown
    # The file has the trained weights: 8 bits are far beyond 20 dB, and weights of another seed are below 0.
    with torch.no_grad():
        (deployed,) = run_onnx(path, x).values()
        assert sqnr_of(trained(x), deployed) > 20


@pytest.mark.slow
def test_compare_times_each_way(capsys):
    assert main(["compare", "tests.test_main:with_inputs", "--seconds", "0.01", "--json"]) == 0
    shown = capsys.readouterr()
    values = json.loads(shown.out)
    assert [(value["model"], value["runtime"]) for value in values] == [
        *(("float", "PyTorch"), ("quantized", "PyTorch")),
        *(("float", "onnxruntime"), ("quantized", "onnxruntime")),
    ]
    assert all(value["ms"] > 0 and value["note"] is None for value in values)
    assert [values[0]["speedup"], values[2]["speedup"]] == [1, 1]
    # Three roundings to 8 bits leave 25 dB and more: each alone leaves 35.
    assert values[1]["output_SQNR_dB"] > 25 and values[3]["output_SQNR_dB"] > 25
    assert "clips are those of random inputs" in shown.err


@pytest.mark.models
def test_names_of_other_libraries(capsys):
    pytest.importorskip("timm")
    assert main(["table", "timm/test_resnet", "--input", "1x3x64x64"]) == 0
    assert "quantized: 100.00%" in capsys.readouterr().out
    for name, message in (
        ("timm/test_resne", "timm has no model 'test_resne'; some are test_resnet"),
        ("transformers/no_such", "transformers has no type 'no_such'"),
    ):
        assert main(["table", name]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.models
def test_a_transformer_by_its_folder(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    small = transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    transformers.AutoModel.from_config(small).save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["table", f"transformers/{tmp_path}", "--input", "1x8", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert any("query" in value["node"] for value in values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "no_such_file.pt"], "--weights no_such_file.pt: "),
        (["--config", "{"], "--config {: "),
        (["--config", '{"bits": 3}'], "Config has no field bits"),
        (["--override", "fc"], "--override fc: GLOB=BITS, or GLOB=float"),
        (["--edge-bits", "two"], "--edge-bits two: a number of bits, or none"),
        (["--data", "nothing"], "--data nothing: package.module:callable, which returns batches"),
        (["--data", "os:getpid"], "--data os:getpid returned int, not batches"),
        (["--sort", "error"], "sort='error': one of node"),
    ],
)
def test_errors_of_options(arguments, message, capsys):
    assert main(["table", "tests.test_main:tiny", "--input", "2x8", *arguments]) == 1
    assert f"octav_fx: {message}" in capsys.readouterr().err


def broken() -> nn.Module:
    """Fail as a user's own code may."""
    raise ValueError("no such checkpoint")


def test_errors_of_other_code_have_no_traceback_unless_asked_for(capsys, monkeypatch):
    assert main(["table", "tests.test_main:broken"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "octav_fx: ValueError: no such checkpoint",
        "OCTAV_FX_TRACEBACK=1 shows where it comes from",
    ]
    monkeypatch.setenv("OCTAV_FX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no such checkpoint"):
        main(["table", "tests.test_main:broken"])


def test_a_folder_that_is_not_there_is_told_before_any_work(capsys):
    assert main(["export", "no_such:model", "--onnx", "no/such/folder/model.onnx"]) == 1
    assert "is no folder that can be written to" in capsys.readouterr().err


def test_demo_passes_its_options_on(monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "main", lambda *arguments: seen.append(arguments))
    assert main(["demo", "--epochs", "3", "--seed", "5", "--out", "folder"]) == 0
    assert main(["demo"]) == 0
    assert seen == [(3, 5, Path("folder")), (4, 0, None)]
