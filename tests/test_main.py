"""python -m octav_fx: what it prints, and errors without a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from octav_fx import demo, quantize, table
from octav_fx.__main__ import main

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
    assert "usage: python -m octav_fx" in capsys.readouterr().err


def test_demo_passes_its_options_on(monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "main", lambda *arguments: seen.append(arguments))
    assert main(["demo", "--epochs", "3", "--seed", "5"]) == 0
    assert main(["demo"]) == 0
    assert seen == [(3, 5), (4, 0)]
