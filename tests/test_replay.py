"""./dev replay: the same texts in every process, a change that is found and named, paths that do not matter."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import fx

from benchmarks.replay import __main__ as command
from benchmarks.replay import compare
from benchmarks.replay.models import MODELS, Model
from benchmarks.replay.record import record
from benchmarks.replay.text import graph_lines, normal
from octav_fx import Config

ROOT = Path(__file__).parent.parent
# A whole graph, one in parts with its reasons, one with a check on a size.
SMALL = ("attended with bias", "branch in the open", "branch on size")


def named(name: str) -> Model:
    return next(model for model in MODELS if model.name == name)


@pytest.fixture
def hashes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the committed hashes, empty and elsewhere."""
    path = tmp_path / "replay.json"
    monkeypatch.setattr(compare, "HASHES", path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["replay", *arguments])
    return command.main()


@pytest.mark.slow
def test_another_process_with_other_hashes_writes_the_same(tmp_path: Path) -> None:
    output = tmp_path / "texts.json"
    only = [option for name in SMALL for option in ("--only", name)]
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.replay", "--texts", str(output), *only],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(output.read_text())
    assert theirs == {name: record(named(name)) for name in SMALL}
    lowered = theirs["branch in the open"]["training lowered"]
    assert "quantize" in lowered and "_backward" in lowered
    assert str(ROOT) not in output.read_text() and " at 0x" not in output.read_text()


def test_what_is_committed_is_what_the_models_are() -> None:
    committed = compare.committed()
    assert list(committed) == [model.name for model in MODELS if model.name in committed]
    assert {model.name for model in MODELS if not model.needs} <= set(committed)
    assert len({model.name for model in MODELS}) == len(MODELS)


def test_a_change_is_found_and_named(
    hashes_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_config(config: Config) -> None:
        changed = dataclasses.replace(named("own leaf"), config=config)
        monkeypatch.setattr(command, "MODELS", (named("decorated"), changed))

    assert run(monkeypatch, "--only", "own leaf", "--only", "decorated", "--write") == 0
    assert run(monkeypatch, "--only", "own leaf") == 0
    with_config(Config(weight_gradient="ste"))
    before = json.loads(hashes_in.read_text())
    monkeypatch.setattr(compare, "texts_of", lambda ref, names: {n: record(named(n)) for n in names})
    capsys.readouterr()
    assert run(monkeypatch, "--diff") == 1
    out = capsys.readouterr().out
    # The gradient of a weight stands in no table.
    changes = [line for line in out.splitlines() if line.startswith("changed: ")]
    assert changes == ["changed: own leaf: training graph", "changed: own leaf: eval graph"]
    assert "-quantizers" in out and ", mad)" in out and ", ste)" in out and "own leaf: eval graph (HEAD)" in out
    assert json.loads(hashes_in.read_text()) == before


def test_a_model_that_is_no_more_and_one_of_a_library_that_nobody_has_recorded(
    hashes_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hashes_in.write_text(json.dumps({"gone": {"table": "0"}}))
    monkeypatch.setattr(command, "MODELS", (dataclasses.replace(named("decorated"), needs="torch"),))
    assert run(monkeypatch) == 1
    out = capsys.readouterr().out
    assert "gone: gone: table" in out and "not compared, for it is not committed: decorated" in out
    monkeypatch.setattr(command, "MODELS", (dataclasses.replace(named("decorated"), needs="no_such_library"),))
    hashes_in.write_text("{}")
    assert run(monkeypatch) == 0
    assert "not here, for no_such_library is not installed: decorated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("check(x, '/home/me/nets.py:31')", "check(x, 'nets.py')"),
        ("because /a/b-c/.venv/lib/python3.11/x_y.py:7: forward", "because x_y.py: forward"),
        ("nets.py:31 and a/nets.py:3", "nets.py and nets.py"),
        ("<function f at 0x7f00ab>", "<function f>"),
        ("<class 'octav_fx.graph.rebuild.Rebuilt'>", "<class 'Rebuilt'>"),
        ("call octav_fx.quantize again with octav_fx.Config()", "call octav_fx.quantize again with octav_fx.Config()"),
        ("torch.ops.octav.fake_quantize.default", "torch.ops.octav.fake_quantize.default"),
        ("x = add(a, 1.5)", "x = add(a, 1.5)"),
    ],
)
def test_where_files_are_does_not_matter(text: str, expected: str) -> None:
    assert normal(text) == expected


def test_inputs_and_their_defaults_are_lines() -> None:
    graph = fx.Graph()
    x, scale = graph.placeholder("x"), graph.placeholder("scale", default_value=2.0)
    graph.output(graph.call_method("mul", (x, scale)))
    assert graph_lines(graph) == "x = input(x)\nscale = input(scale = 2.0)\nmul = x.mul(scale)\nreturn mul"
