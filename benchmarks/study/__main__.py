"""python -m benchmarks.study: run what is missing of the study, print its tables, write its results.

Each run is a process of one thread. What has finished is kept in a file of its own, so that the study can be stopped
anywhere and goes on where it was.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from benchmarks import result
from benchmarks.study import tables
from benchmarks.study.run import Run
from benchmarks.study.summary import kept, write
from benchmarks.study.train import RESULT, WORK
from examples.common import files

RESULTS: Final = result.RESULTS / "study"
MEASURED: Final = 6


def main() -> int:
    """Run the tables that are asked for; returns 1 if a run broke off, other than by its loss."""
    parser = argparse.ArgumentParser(prog="./dev study", description="Run what is missing of the study.")
    parser.add_argument(
        "tables", nargs="*", metavar="TABLE", help=f"of {', '.join(tables.TABLES)} (default: the study)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, one thread each (default 1)")
    parser.add_argument("--size", default="small", help='"large" is for a GPU')
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, help="of shorter runs, to try it out; give --results and --work, too")
    parser.add_argument("--limit", type=float, help="start no run after so many seconds")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of curves and checkpoints")
    options = parser.parse_args()
    names = tuple(options.tables) or tables.DEFAULT
    if unknown := sorted(set(names) - set(tables.TABLES)):
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(tables.TABLES)}")
    runs = tables.all_runs(names, options.size)
    extra = ["--device", options.device, *(["--steps", str(options.steps)] if options.steps else [])]
    broken = perform(runs, options.results, options.work, options.jobs, extra, options.limit)
    print(write(options.results, options.size))
    for run, log in broken:
        print(f"{run.name} broke off: {log}", file=sys.stderr)
    return 1 if broken else 0


def perform(
    runs: list[Run], results: Path, work: Path, jobs: int, extra: list[str], limit: float | None = None
) -> list[tuple[Run, str]]:
    """Run what has no result yet, parents before those that start from them; returns what broke off, and why."""
    end = float("inf") if limit is None else time.monotonic() + limit
    left = [run for run in runs if not kept(results, run).exists()]
    # A result may have been kept where its net was not.
    starts = {run.parent for run in left if run.parent is not None}
    parents = [run for run in runs if run in starts and not (work / run.name / RESULT).exists()]
    first = list(dict.fromkeys([*parents, *(run for run in left if run.parent is None)]))
    second = [run for run in left if run.parent is not None]
    broken: list[tuple[Run, str]] = []
    with tqdm(total=len(first) + len(second), unit="run", desc="study") as bar, ThreadPoolExecutor(jobs) as pool:

        def one(run: Run) -> None:
            if time.monotonic() < end:
                if problem := _process(run, results, work, extra):
                    broken.append((run, problem))
                bar.update()

        for runs_of_one_kind in (first, second):
            list(pool.map(one, runs_of_one_kind))
    return broken


def _process(run: Run, results: Path, work: Path, extra: list[str]) -> str | None:
    """Run in a process of its own; return None, or the last line it printed if it left no result."""
    folder = work / run.name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.study.train", *run.arguments(), "--out", str(folder), *extra]
    command += ["--parent", str(work / run.parent.name)] if run.parent else []
    command += ["--measured", str(MEASURED)] if tables.is_measured(run) else []
    # It may be of a run with other steps; one that is finished writes it again.
    (folder / RESULT).unlink(missing_ok=True)
    with (folder / "log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if (folder / RESULT).exists():
        # A loss that stopped being finite is a result, too. That of a parent which ran for its net alone is known.
        if not kept(results, run).exists():
            _keep(results, run, json.loads((folder / RESULT).read_text()))
        return None
    lines = (folder / "log").read_text().splitlines()
    return lines[-1] if lines else f"exit {done.returncode}"


def _keep(results: Path, run: Run, found: dict[str, Any]) -> None:
    """Keep the result of a run, with as much of its curve and errors as plots show."""
    path = kept(results, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, lambda place: place.write_text(json.dumps(_short(found), indent=1) + "\n"))


def _short(found: dict[str, Any], points: int = 20) -> dict[str, Any]:
    curve = found["curve"]
    parts = [curve[len(curve) * i // points : len(curve) * (i + 1) // points] for i in range(points)]
    losses = [[part[-1]["step"], round(sum(row["loss"] for row in part) / len(part), 4)] for part in parts if part]
    groups: dict[tuple[int, str, int], list[dict[str, Any]]] = {}
    for row in found["errors"]:
        groups.setdefault((row["step"], row["kind"], row["bits"]), []).append(row)
    return {
        **found,
        "curve": losses,
        "scores": [[row["step"], row["score"]] for row in curve if row["score"] is not None],
        "errors": [
            {
                "step": step,
                "kind": kind,
                "bits": bits,
                "operands": len(rows),
                # Signal to quantization noise in dB, the mean over the operands.
                "sqnr": round(sum(row["sqnr"] for row in rows) / len(rows), 2),
                "cold": max((row["cold"] for row in rows if row["cold"] is not None), default=None),
                "hinted": max((row["hinted"] for row in rows if row["hinted"] is not None), default=None),
            }
            for (step, kind, bits), rows in groups.items()
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
