"""The study's tables, CSV and plots, made from the files of its runs and from nothing else."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any, Final

from tabulate import tabulate

from benchmarks.study import plot, tables
from benchmarks.study.measure import MOST
from benchmarks.study.run import FLOAT, Run
from benchmarks.study.tables import TABLES, Table
from examples.common import files

Found = dict[Run, dict[str, Any]]
# What the CSV says of where a run was made.
_WHERE: Final = ("torch", "commit", "date")


def kept(results: Path, run: Run) -> Path:
    """Return the file of a run's result."""
    return results / "runs" / f"{run.name}.json"


def found_in(results: Path) -> Found:
    """Return the results that are there."""
    kept_values = [json.loads(path.read_text()) for path in sorted((results / "runs").glob("*.json"))]
    return {Run(**values["run"]): values for values in kept_values}


def write(results: Path, size: str = "small") -> str:
    """Write runs.csv and the plots beside the runs; returns the tables as text."""
    found = found_in(results)
    rows = [_csv_row(run, values) for run, values in found.items()]
    files.write_csv(results / "runs.csv", rows)
    plot.scores(found, TABLES["main"], _picture(results, "main", size), size)
    plot.losses(found, TABLES["main"], _picture(results, "losses", size), size)
    plot.errors(found, _picture(results, "errors", size), size)
    plot.differences(_shown(found, size), _picture(results, "clips", size))
    return "\n\n".join(texts(found, size))


def _picture(results: Path, name: str, size: str) -> Path:
    return results / f"{name}{'' if size == 'small' else f'-{size}'}.png"


def markdown(results: Path) -> str:
    """Return what the README says of the study in its small size: nothing where nothing has been run."""
    found = {run: values for run, values in found_in(results).items() if run.size != "large"}
    if not found:
        return ""
    environments = [values["environment"] for values in found.values()]
    where = [", ".join(sorted({str(e[name]) for e in environments})) for name in ("cpu", "torch", "commit", "date")]
    hours = sum(values["seconds"] for values in found.values()) / 3600
    line = f"{where[0]}, torch {where[1]}, commit {where[2]}, {where[3]}: {len(found)} runs, {hours:.1f} core hours."
    return "\n\n".join([line, *(part[0].upper() + part[1:].replace("\n\n", ":\n\n", 1) for part in texts(found))])


def texts(found: Found, size: str = "small") -> list[str]:
    """Return a text for each table of which a run is there, then the errors and Newton's steps."""
    parts = [
        f"{table.title}\n\n{text(table, found, size)}" for table in TABLES.values() if _present(table, found, size)
    ]
    rows = error_rows(found, size)
    if rows:
        shown = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
        title = "signal to quantization noise, measured in dB (4 bits but for edge layers, seed 0, mean over training)"
        parts.append(f"{title}\n\n{shown}")
    steps = step_rows(found, size)
    if steps:
        shown = tabulate(steps, headers="keys", tablefmt="github", disable_numparse=True)
        parts.append(f"Newton steps until no clip moves by a thousandth, the most of any operand\n\n{shown}")
    return parts


def text(table: Table, found: Found, size: str = "small") -> str:
    """Return a row for each label, a column for each net: mean and, of several seeds, least and greatest.

    Of a table that tells labels apart from one of them, what compared() returns.
    """
    if table.against:
        return compared(table, found, size)
    sized = table.sized(size)
    columns = list(dict.fromkeys(run.column for _, run in sized))
    titles = [", ".join(column) + f" ({_unit(found, column[0])})" for column in columns]
    rows = []
    for label in dict.fromkeys(label for label, _ in sized):
        cells = []
        for column in columns:
            runs = [run for name, run in sized if name == label and run.column == column]
            cells.append(cell([found[run] for run in runs if run in found], len(runs)))
        rows.append([label, *cells])
    return tabulate(rows, ["", *titles], "github", disable_numparse=True)


def cell(values: list[dict[str, Any]], wanted: int) -> str:
    """Return what a table says of the runs of some seeds; that some are missing or broke off, too."""
    if not values:
        return "-"
    finals = [value["final"] for value in values if value["final"] is not None]
    stopped = len(values) - len(finals)
    parts = []
    if finals:
        form = ".2f" if values[0]["score"] == "accuracy" else ".3f"
        parts.append(format(statistics.mean(finals), form))
        if len(finals) > 1:
            parts.append(f"({min(finals):{form}} to {max(finals):{form}})")
    if stopped:
        parts.append("not finite" if not finals else f"{stopped} of {len(values)} not finite")
    if len(values) < wanted:
        parts.append(f"[{len(values)} of {wanted} seeds]")
    return " ".join(parts)


def compared(table: Table, found: Found, size: str = "small") -> str:
    """Return a row for each label that was run: its seeds, the mean score, by how much it and the loss differ in each.

    The loss is that of the last quarter of the training: on text, of which little is read twice, it is a score, too,
    and of many nets instead of one.
    """
    there = _finished(table, found, size)
    differ = differences(table, found, size)
    rows = []
    for label in differ:
        finals = [found[run]["final"] for name, run in there if name == label]
        if not finals:
            continue
        shown = [_with_error([pair[i] for pair in differ[label]]) for i in (0, 1)]
        rows.append(
            [label, len(finals), f"{statistics.mean(finals):.3f}", *(shown if label != table.against else ("", ""))]
        )
    unit = _unit(found, table.runs[0][1].recipe)
    return tabulate(rows, ["", "seeds", unit, "difference", "of the training loss"], "github", disable_numparse=True)


def differences(table: Table, found: Found, size: str) -> dict[str, list[tuple[float, float]]]:
    """Return label -> by how much score and training loss differ from those of the table's reference, seed by seed."""
    there = _finished(table, found, size)
    others = {run.seed: found[run] for label, run in there if label == table.against}
    differ: dict[str, list[tuple[float, float]]] = {label: [] for label, _ in table.runs}
    for label, run in there:
        if run.seed in others:
            one, other = found[run], others[run.seed]
            differ[label].append((one["final"] - other["final"], last_quarter(one) - last_quarter(other)))
    return differ


def last_quarter(values: dict[str, Any]) -> float:
    """Return the mean loss of the last quarter of a training."""
    curve = values["curve"]
    return statistics.mean(loss for _, loss in curve[-(len(curve) // 4) :])


def _finished(table: Table, found: Found, size: str) -> list[tuple[str, Run]]:
    """Return the labelled runs that have a score."""
    return [(label, run) for label, run in table.sized(size) if run in found and found[run]["final"] is not None]


def _shown(found: Found, size: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return title -> differences, for each table that has them; without the reference, and float, which is far off."""
    panels = {
        f"{name}: against {table.against}": {
            label: points
            for label, points in differences(table, found, size).items()
            if points and label not in (table.against, FLOAT)
        }
        for name, table in TABLES.items()
        if table.against
    }
    return {title: lines for title, lines in panels.items() if lines}


def _with_error(differences: list[float]) -> str:
    """Return the mean and, of several seeds, its standard error."""
    if not differences:
        return "-"
    mean = f"{statistics.mean(differences):+.3f}"
    if len(differences) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(differences) / len(differences) ** 0.5:.3f}"


def error_rows(found: Found, size: str = "small") -> list[dict[str, str]]:
    """Return SQNR by kind of operand and net, a column for each method; the mean over the points of training."""
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run, values in _measured(found, size):
        for row in values["errors"]:
            kind = row["kind"] if row["bits"] == run.bits else f"{row['kind']}, edge, {row['bits']} bits"
            cells.setdefault((_column(run), kind), {}).setdefault(run.clip, []).append(row["sqnr"])
    methods = [clip for clip in tables.EVERY if any(clip in of_kind for of_kind in cells.values())]
    return [
        {"net": net, "operands": kind}
        | {m: f"{statistics.mean(of_kind[m]):.1f}" if m in of_kind else "-" for m in methods}
        for (net, kind), of_kind in cells.items()
    ]


def step_rows(found: Found, size: str = "small") -> list[dict[str, str]]:
    """Return Newton's steps by net and recursion: from the mean magnitude and from the last clip."""
    rows = []
    for run, values in _measured(found, size):
        counted = [row for row in values["errors"] if row["cold"] is not None]
        if counted:
            later = [row["hinted"] for row in counted if row["step"] > 0]
            rows.append(
                {"net": _column(run), "clip": run.clip, "cold": _steps([row["cold"] for row in counted])}
                | {"from the last clip, most": _steps(later)}
                | {"from the last clip, median": f"{statistics.median(later):g}" if later else "-"}
            )
    return rows


def _steps(counts: list[int]) -> str:
    """Return the most of some counts."""
    most = max(counts, default=0)
    return f"cycles after {MOST}" if most >= MOST else str(most or "-")


def _measured(found: Found, size: str) -> list[tuple[Run, dict[str, Any]]]:
    """Return the runs that measured errors, in the order of the tables."""
    wanted = tables.all_runs(tuple(TABLES), size)
    return [(run, found[run]) for run in wanted if run in found and found[run]["errors"]]


def _column(run: Run) -> str:
    return f"{run.recipe}, {run.net}" + (", full attention" if run.attention == "full" else "")


def _present(table: Table, found: Found, size: str) -> bool:
    # What the main table has, too, says nothing of another.
    shared = set() if table is TABLES["main"] else {run for _, run in TABLES["main"].runs}
    own = [sized for (_, sized), (_, run) in zip(table.sized(size), table.runs, strict=True) if run not in shared]
    return any(run in found for run in own)


def _unit(found: Found, recipe: str) -> str:
    return next((values["score"] for run, values in found.items() if run.recipe == recipe), "no run yet")


def _csv_row(run: Run, values: dict[str, Any]) -> dict[str, Any]:
    measured = {name: values[name] for name in ("score", "final", "failed", "steps", "seconds")}
    return {**dataclasses.asdict(run), **measured, **{name: values["environment"][name] for name in _WHERE}}
