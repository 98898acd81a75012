"""./dev gpu, as far as it can be tried without a GPU: how it ends, what it writes, what a limit of time leaves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import result
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import dequantize, fake_quantize, int_matmul, limited, optimal_clip, quantize, step, worker
from octav_fx.ops.int_matmul.measured import Measured

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_a_gpu_it_says_so_and_touches_nothing() -> None:
    before = contents(result.RESULTS)
    # In any folder, and in the Python that has torch.
    done = subprocess.run([sys.executable, ROOT / "dev", "gpu"], cwd="/", capture_output=True, text=True)
    assert done.returncode == command.NO_GPU
    assert len(done.stdout.splitlines()) == 1
    assert "no GPU" in done.stdout
    assert contents(result.RESULTS) == before


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One op and no models: nothing to compile."""
    monkeypatch.setattr(step, "TINY", {})
    monkeypatch.setattr(worker, "KERNELS", {"quantize": quantize.measure})


def tried(folder: Path, test: str) -> int:
    """The command on a CPU, with a file of one test for those of the kernels."""
    file = folder / "test_one.py"
    file.write_text(f"def test_one():\n    {test}\n")
    return command.main(["kernels", "--device", "cpu", "--folder", str(folder / "results"), "--tests", str(file)])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("test", ["assert 1 + 1 == 3", "import pytest; pytest.skip('no Triton')"])
def test_no_speed_is_reported_when_no_test_is_green(
    test: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tried(tmp_path, test) == command.RED
    assert not (tmp_path / "results").exists()
    printed = capsys.readouterr().out
    assert "1 failed" in printed or "1 skipped" in printed
    assert "no speed is measured" in printed


@pytest.mark.usefixtures("small")
def test_what_is_written(tmp_path: Path) -> None:
    before = contents(result.RESULTS)
    assert tried(tmp_path, "pass") == 0
    found = json.loads((tmp_path / "results" / "cpu-kernels.json").read_text())
    assert list(found) == ["environment", "gpu", "sources", "tests", "setting", "quantize"]
    assert found["environment"]["torch"] == torch.__version__
    assert found["tests"].startswith("1 passed")
    assert [row["op"] for row in found["quantize"]["rows"]] == ["quantize"] * 3
    assert "stopped" not in found["quantize"]
    assert contents(result.RESULTS) == before


@pytest.mark.usefixtures("small")
def test_another_run_goes_on_where_the_last_one_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(tmp_path, "pass") == 0
    first = result.read("cpu-kernels", tmp_path / "results")
    asked = []

    class Worker(Stub):
        def rows(self, seconds: float, take: Any) -> None:
            asked.append(self.arguments[1])
            take({"op": self.arguments[1]})

    monkeypatch.setattr(limited, "Worker", Worker)
    monkeypatch.setattr(worker, "KERNELS", {"quantize": quantize.measure, "dequantize": dequantize.measure})
    assert tried(tmp_path, "pass") == 0
    assert asked == ["dequantize"]
    second = result.read("cpu-kernels", tmp_path / "results")
    assert second["quantize"] == first["quantize"]
    monkeypatch.setattr(result, "sources", lambda: "others")
    assert tried(tmp_path, "pass") == 0
    assert asked == ["dequantize", "quantize", "dequantize"]


class Stub:
    """A process of which only its rows are asked."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments

    def wait(self, seconds: float) -> None: ...

    def go_on(self) -> None: ...

    def end(self) -> None: ...


def test_steps_are_timed_only_where_the_kernels_were_green(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Worker(Stub):
        def rows(self, seconds: float, take: Any) -> None:
            _, model, variant = self.arguments[-3:]
            take({"model": model, "variant": variant, "ms": 2.0, "mb": 1.0, "note": ""})

    monkeypatch.setattr(limited, "Worker", Worker)
    monkeypatch.setattr(worker, "KERNELS", {})
    steps = ["resnet50", "--device", "cpu", "--folder", str(tmp_path / "results")]
    assert command.main(steps) == command.RED
    assert "./dev gpu --folder" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    assert tried(tmp_path, "pass") == 0
    assert command.main(steps) == 0
    found = result.read("cpu-resnet50", tmp_path / "results")
    assert found["tests"].startswith("1 passed")
    assert [row["variant"] for row in found["step"]["rows"]] == list(step.VARIANTS)
    monkeypatch.setattr(result, "sources", lambda: "others")
    assert command.main(steps) == command.RED


def test_it_runs_where_octav_fx_is_not_installed(tmp_path: Path) -> None:
    """In a copy, with a Python that has all packages but this one, torch finds the backend by its entry point."""
    copy, site = tmp_path / "copy", tmp_path / "site"
    site.mkdir()
    for path in Path(str(torch.__file__)).parents[1].iterdir():
        if "octav_fx" not in path.name:
            (site / path.name).symlink_to(path)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    test = copy / "test_one.py"
    test.write_text(
        "import octav_fx, torch\n\ndef test_one():\n    assert 'octav' in torch._dynamo.list_backends()\n"
        f"    assert octav_fx.__file__.startswith({str(copy)!r})\n"
    )
    # All rows but one of each kind: every row is a process, and the rows themselves are tested in this one.
    left = {"kernels": "quantize", "resnet50": "octav compiled", "transformers": ""}
    ops = {op: {"rows": [{"op": op, "ms": 1.0}]} for op in worker.KERNELS if op != left["kernels"]}
    _leave(tmp_path / "results", "kernels", ops)
    for name in ("resnet50", "transformers"):
        timed = {"model": "tiny", "ms": 1.0, "mb": 1.0, "note": ""}
        rows = [{**timed, "variant": variant} for variant in step.VARIANTS if variant != left[name]]
        _leave(tmp_path / "results", name, {"step": {"rows": rows}})
    options = ["--device", "cpu", "--folder", tmp_path / "results", "--tests", test]
    # The C++ passes are compiled already.
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys._base_executable, copy / "dev", "gpu", *options],
        env={**environment, "XDG_CACHE_HOME": cache},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in command.COMMANDS:
        found = result.read(f"cpu-{name}", tmp_path / "results")
        rows = [row for part in found.values() if isinstance(part, dict) for row in part.get("rows", [])]
        assert not [row for row in rows if "error" in row]
        # Something was measured by now, and what was there was left.
        measured = [row for row in rows if left[name] in (row.get("op"), row.get("variant"))]
        assert bool(measured) == bool(left[name])
        assert len(rows) > len(measured)


def _leave(folder: Path, name: str, parts: dict[str, Any]) -> None:
    """Write what an earlier run of the same sources would have left."""
    result.write(f"cpu-{name}", {"sources": result.sources(), "tests": "1 passed", **parts}, folder)


def test_trying_it_never_writes_among_the_results() -> None:
    with pytest.raises(SystemExit):
        command.main(["--device", "cpu"])


def test_a_limit_of_time_leaves_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "endless.py").write_text(
        "import time\nprint('some library says hello')\nprint('{\"row\": 1}', flush=True)\ntime.sleep(600)\n"
    )
    (tmp_path / "broken.py").write_text("print('{\"row\": 2}', flush=True)\nraise ValueError('why')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found: list[dict[str, Any]] = []
    assert limited.Worker(["endless"]).rows(5, found.append) == "over 5 s"
    assert limited.Worker(["broken"]).rows(60, found.append) == "exit 1: ValueError: why"
    assert found == [{"row": 1}, {"row": 2}]


def test_what_is_prepared_goes_on_when_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "held.py").write_text(
        "import sys\nprint('ready', flush=True)\nsys.stdin.readline()\nprint('{\"row\": 1}', flush=True)\n"
    )
    (tmp_path / "broken.py").write_text("raise ValueError('why')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found: list[dict[str, Any]] = []
    held, broken = limited.Worker(["held"]), limited.Worker(["broken"])
    for one in (held, broken):
        one.wait(60)
    assert held.rows(1, found.append) == "over 1 s"
    assert found == []
    held = limited.Worker(["held"])
    for one in (held, broken):
        one.go_on()
    assert held.rows(60, found.append) is None
    assert found == [{"row": 1}]
    assert broken.rows(60, found.append) == "exit 1: ValueError: why"


def test_a_report_is_on_disk_after_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = command.Report("some", tmp_path, "cpu", begun=0.0, tests="1 passed")
    seen = []

    class Worker(Stub):
        def rows(self, seconds: float, take: Any) -> str:
            for row in (
                {"model": "a", "variant": step.FLOAT, "ms": 2.0, "mb": 8.0},
                {"model": "a", "variant": "other"},
            ):
                take(row)
                seen.append(len(result.read("some", tmp_path)["step"]["rows"]))
            return "over 1 s"

    monkeypatch.setattr(limited, "Worker", Worker)
    assert report.ask("step", ["step", "cpu"], 1.0) == "over 1 s"
    assert seen == [1, 2]


def test_ratios_are_to_the_float_model_of_the_same_name() -> None:
    base = {"model": "a", "variant": step.FLOAT, "ms": 2.0, "mb": 8.0}
    other = {"model": "a", "variant": "octav compiled", "ms": 3.0, "mb": 4.0}
    alone = {"model": "b", "variant": "octav compiled", "ms": 3.0, "mb": 4.0}
    failed = {"model": "a", "variant": "octav compiled", "error": "exit 1: out of memory"}
    assert step.with_ratios([other, base, alone, failed]) == [
        {**other, "ratio": 1.5, "memory": 0.5},
        {**base, "ratio": 1.0, "memory": 1.0},
        alone,
        failed,
    ]


@pytest.mark.parametrize("question", [optimal_clip, quantize, dequantize, fake_quantize])
def test_rows_of_a_kernel(question: Any) -> None:
    with torch.no_grad():
        rows = list(question.measure("cpu"))
    for row in rows:
        assert row["op"].startswith(question.__name__.rpartition(".")[2])
        assert row["ms"] > 0
    assert {row["bytes"] for row in rows if row["op"].endswith("quantize")} <= {3, 4, 5, 6}


def test_rows_of_the_matmul() -> None:
    assert [(row["way"], row["m"]) for row in int_matmul.measure("cpu")] == [("bfloat16", 64), ("int8", 64)]


def test_the_table_of_the_matmul() -> None:
    shape = {"m": 64, "n": 32, "k": 16}
    rows = [{**shape, "way": way, "ratio": ratio} for way, ratio in (("bfloat16", 1.0), ("int8", 0.7), ("float8", 0.6))]
    other = {"m": 1, "n": 2, "k": 3, "way": "int8", "ratio": 2.0}
    # One that the limit of time cut off has no ratio yet.
    cut_off = {"m": 5, "n": 5, "k": 5, "way": "bfloat16", "ratio": 1.0}
    table = int_matmul.table([*rows, {**rows[1], "way": "int8, a tile", "ratio": 0.1}, other, cut_off])
    assert table == [Measured(64, 32, 16, 0.7, 0.6), Measured(1, 2, 3, 2.0)]


@pytest.mark.parametrize("variant", ["float eager", "octav eager", "ten cold Newton steps, plain PyTorch eager"])
def test_a_row_of_a_step(variant: str) -> None:
    (row,) = step.measure("tiny", variant, "cpu", 1)
    assert list(row) == ["model", "variant", "ms", "mb", "note"]


def test_bert_without_transformers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with torch.device("meta"):
        model, note = step.MODELS["transformers"]["BERT-base, 32 x 384 tokens"].load()
        assert model(step.MODELS["transformers"]["BERT-base, 32 x 384 tokens"].batch("meta")).shape == (
            32,
            step.CLASSES,
        )
    assert "transformers cannot be imported" in note
    # BERT-base without its pooler: 12 layers of 7.1 million, and 23.4 million of words.
    assert 105e6 < sum(p.numel() for p in model.parameters()) < 115e6


def test_the_tests_of_every_kernel_are_run() -> None:
    files = command.kernel_tests()
    assert "tests/ops/test_int_matmul.py" in files
    assert "tests/ops/test_register.py" not in files


def test_files_without_their_history_have_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = result.environment()
    assert found["commit"] is None
    assert found["uncommitted"] is None
