"""The study's runner and what is made of its files."""

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.study import __main__ as study_module
from benchmarks.study import recipes, summary, tables, train
from benchmarks.study.run import FLOAT, Run
from examples.common import loop

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
STEPS = 24
RUNS = [run for _, run in tables.TABLES["digits"].runs]


def study(folder, **more):
    command = [sys.executable, "-m", "benchmarks.study", "digits", "--jobs", "2", "--steps", str(STEPS)]
    command += ["--results", str(folder / "results"), "--work", str(folder / "work")]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True, text=True, **more
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study that was killed with all its processes when one had begun, and run again."""
    path = tmp_path_factory.mktemp("study")
    first = study(path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(path.glob(f"work/*/{loop.CHECKPOINT}")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not all(summary.kept(path / "results", run).exists() for run in RUNS)
    again = study(path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    (path / "printed").write_text(again.communicate(timeout=240)[0])
    assert again.returncode == 0
    return path


def test_it_goes_on_where_it_was_killed(folder, tmp_path):
    for run in RUNS:
        kept = json.loads(summary.kept(folder / "results", run).read_text())
        assert (folder / "work" / run.name / "curve.png").read_bytes().startswith(b"\x89PNG")
        assert Run(**kept["run"]) == run and kept["steps"] == STEPS
        train.train(run, tmp_path / run.name, steps=STEPS)
        curve = (tmp_path / run.name / loop.CURVE).read_text()
        assert (folder / "work" / run.name / loop.CURVE).read_text() == curve
        assert kept["final"] == pytest.approx(float(curve.splitlines()[-1].split(",")[-1]), abs=0)


def test_what_is_there_is_not_run_again(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.glob("results/runs/*")}
    assert len(before) == 2
    done = study(folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    done.communicate(timeout=120)
    assert done.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("results/runs/*")} == before


def test_a_result_of_another_run_is_not_taken_for_its_own(tmp_path, monkeypatch):
    run = Run("digits", "resnet")
    folder = tmp_path / "work" / run.name
    folder.mkdir(parents=True)
    (folder / train.RESULT).write_text("{}")
    monkeypatch.setattr(study_module.sys, "executable", "/bin/false")
    assert study_module.perform([run], tmp_path / "results", tmp_path / "work", 1, []) == [(run, "exit 1")]
    assert not (tmp_path / "results").exists()


def test_a_parent_is_run_again_where_its_net_is_gone_and_its_result_stays(tmp_path):
    child = Run("digits", "resnet", "octav", start="float")
    kept = summary.kept(tmp_path / "results", child.parent)
    kept.parent.mkdir(parents=True)
    kept.write_text("as it was")
    runs = [child.parent, child]
    assert study_module.perform(runs, tmp_path / "results", tmp_path / "work", 1, ["--steps", "4"]) == []
    assert kept.read_text() == "as it was"
    assert json.loads(summary.kept(tmp_path / "results", child).read_text())["final"] > 0


def test_table_csv_and_markdown_come_from_the_files(folder):
    found = summary.found_in(folder / "results")
    assert set(found) == set(RUNS)
    rows = list(csv.DictReader((folder / "results" / "runs.csv").read_text().splitlines()))
    assert {row["clip"]: float(row["final"]) for row in rows} == {run.clip: found[run]["final"] for run in RUNS}
    for text in ((folder / "printed").read_text(), summary.markdown(folder / "results")):
        for run in RUNS:
            assert f"| {run.clip} " in text
            assert f"{found[run]['final']:.2f}" in text


def result(run, final, **more):
    return {"score": "accuracy", "final": final, "errors": [], "curve": [[1, 2.0], [2, 1.0]], **more}


def test_a_cell_is_the_mean_of_its_seeds():
    values = [result(None, value) for value in (90.0, 91.0, 95.0)]
    assert summary.cell(values, 3) == "92.00 (90.00 to 95.00)"
    assert summary.cell(values[:2], 3) == "90.50 (90.00 to 91.00) [2 of 3 seeds]"
    assert summary.cell([*values[:2], result(None, None)], 3) == "90.50 (90.00 to 91.00) 1 of 3 not finite"
    assert summary.cell([result(None, None)], 1) == "not finite"
    assert summary.cell([], 1) == "-"


def test_labels_are_told_apart_seed_by_seed():
    labelled = [(clip, Run("text", "transformer", clip, seed=seed)) for clip in ("max", "octav") for seed in range(3)]
    table = tables.Table("", tuple(labelled), against="max")
    finals = {("max", 0): 3.0, ("max", 1): 3.5, ("octav", 0): 3.1, ("octav", 1): 3.7, ("octav", 2): 9.9}
    curve = [[step, float(step)] for step in range(8)]
    found = {run: result(run, finals[run.clip, run.seed]) for _, run in labelled if (run.clip, run.seed) in finals}
    found = {run: {**values, "run": vars(run), "curve": curve} for run, values in found.items()}
    found[labelled[3][1]]["curve"] = [*curve[:-1], [7, 8.0]]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in summary.text(table, found).splitlines()]
    # Of the third seed there is nothing to compare with; the last quarter has two points.
    assert rows[2] == ["max", "2", "3.250", "", ""]
    assert rows[3] == ["octav", "3", "5.567", "+0.150 ± 0.050", "+0.250 ± 0.250"]


def test_plots_and_errors_of_measured_runs(tmp_path):
    run = Run("glyphs", "resnet", "octav")
    row = {"kind": "3x3", "bits": 4, "operands": 3, "sqnr": 20.0, "cold": 7, "hinted": 2}
    errors = [{"step": step, **row} for step in (0, 5, 10)]
    where = {"cpu": "c", "torch": "t", "commit": "0", "date": "d"}
    (tmp_path / "runs").mkdir()
    for one in (run, replace(run, clip=FLOAT), replace(run, clip="max", seed=1)):
        values = result(one, 90.0, errors=errors if one == run else [], environment=where, seconds=1.0)
        values |= {"run": vars(one), "failed": None, "steps": 2}
        summary.kept(tmp_path, one).write_text(json.dumps(values))
    text = summary.write(tmp_path)
    assert "| glyphs, resnet | 3x3" in text and "20.0" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"main.png", "losses.png", "errors.png"}
    summary.write(tmp_path, "large")
    # Nothing large is there, and what is there stays.
    assert len(list(tmp_path.glob("*.png"))) == 3
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))


def test_every_run_of_the_tables_has_a_recipe_and_a_name_of_its_own():
    runs = tables.all_runs(tuple(tables.TABLES))
    # In any size a table of tiny nets is of those.
    assert {run.size for run in runs} == {"small", "tiny"}
    assert {run.size for run in tables.all_runs(tuple(tables.TABLES), "large")} == {"large", "tiny"}
    assert len({run.name for run in runs}) == len(runs) == len(set(runs))
    for run in runs:
        assert recipes.of(run).steps > 0
    position = {run: i for i, run in enumerate(runs)}
    assert all(position[run.parent] < position[run] for run in runs if run.parent is not None)
    main = [run for _, run in tables.TABLES["main"].runs]
    assert len(main) == (1 + len(tables.METHODS) + len(tables.LATER)) * 3 * len(tables.NETS) == len(set(main))


@pytest.mark.parametrize("net", ["resnet", "mobilenet", "inception"])
def test_quantized_residuals_cost_at_most_a_fifth_of_a_point(net):
    found = summary.found_in(study_module.RESULTS)
    means = [
        statistics.mean(found[Run("glyphs", net, "octav", residual_bits=bits, seed=seed)]["final"] for seed in range(3))
        for bits in (0, 8)
    ]
    assert means[0] - means[1] <= 0.2
