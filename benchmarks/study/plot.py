"""Curves and errors as pictures, from the files that hold them."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from benchmarks.study.run import Run
from benchmarks.study.tables import EVERY, Table

# Files only: there may be no screen.
matplotlib.use("Agg")

# The same in every panel, whichever methods it has.
_COLOURS: Final = {clip: f"C{i}" for i, clip in enumerate(EVERY)}


def curve(source: Path, target: Path, title: str, score: str) -> None:
    """Plot loss and score over the steps of a run's CSV."""
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot([int(row["step"]) for row in rows], [float(row["loss"]) for row in rows], linewidth=0.8)
    left.set(xlabel="step", ylabel="loss", title=title)
    scored = [row for row in rows if row["score"]]
    right.plot([int(row["step"]) for row in scored], [float(row["score"]) for row in scored], marker="o")
    right.set(xlabel="step", ylabel=score)
    figure.savefig(target, dpi=100)
    plt.close(figure)


def scores(found: Mapping[Run, dict[str, Any]], table: Table, target: Path, size: str) -> None:
    """Plot a point for each run of a table, a panel for each net."""

    def draw(axes: Any, runs: list[tuple[str, Run]]) -> None:
        labels = list(dict.fromkeys(label for label, _ in runs))
        axes.plot(
            [found[run]["final"] for _, run in runs], [labels.index(label) for label, _ in runs], "o", fillstyle="none"
        )
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlabel(found[runs[0][1]]["score"])

    _panels(found, table, target, size, draw)


def losses(found: Mapping[Run, dict[str, Any]], table: Table, target: Path, size: str) -> None:
    """Plot the training loss of a table's runs with seed 0, a panel for each net."""

    def draw(axes: Any, runs: list[tuple[str, Run]]) -> None:
        for label, run in runs:
            if run.seed == 0:
                axes.plot(*zip(*found[run]["curve"], strict=True), label=label, linewidth=0.9)
        axes.set(xlabel="step", ylabel="training loss", yscale="log")
        axes.legend(fontsize="small")

    _panels(found, table, target, size, draw)


def differences(panels: Mapping[str, Mapping[str, list[tuple[float, float]]]], target: Path) -> None:
    """Plot by how much the runs of a label differ in score and training loss, a panel for each title."""
    if not panels:
        return
    rows = [len(lines) for lines in panels.values()]
    figure, grid = plt.subplots(
        len(panels),
        squeeze=False,
        figsize=(9, 0.3 * sum(rows) + len(rows)),
        height_ratios=[count + 1 for count in rows],
        layout="constrained",
    )
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=True):
        for place, points in enumerate(lines.values()):
            axes.plot([score for score, _ in points], [place] * len(points), "C0o", fillstyle="none")
            axes.plot([loss for _, loss in points], [place] * len(points), "C1x")
        axes.set_yticks(range(len(lines)), list(lines))
        axes.invert_yaxis()
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set_title(title, fontsize="small")
    handles = [
        Line2D([], [], color="C0", marker="o", fillstyle="none", linestyle="", label="bits per byte or accuracy"),
        Line2D([], [], color="C1", marker="x", linestyle="", label="training loss, last quarter"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize="small")
    figure.savefig(target, dpi=90)
    plt.close(figure)


def errors(found: Mapping[Run, dict[str, Any]], target: Path, size: str) -> None:
    """Plot SQNR over training, a panel for each net and kind of operand, a line for each method."""
    panels: dict[tuple[str, str, str], list[tuple[str, list[tuple[int, float]]]]] = {}
    for run, values in found.items():
        if run.size == size and run.recipe != "digits":
            for kind in dict.fromkeys(row["kind"] for row in values["errors"] if row["bits"] == run.bits):
                line = [(r["step"], r["sqnr"]) for r in values["errors"] if (r["kind"], r["bits"]) == (kind, run.bits)]
                panels.setdefault((run.net, run.attention, kind), []).append((run.clip, line))
    if not panels:
        return
    columns = 4
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(14, 3 * rows), layout="constrained", squeeze=False)
    for axes, ((net, attention, kind), lines) in zip(grid.flat, sorted(panels.items()), strict=False):
        for label, line in sorted(lines):
            axes.plot(*zip(*line, strict=True), color=_COLOURS[label], linewidth=0.9)
        title = f"{net}, {kind}" if attention == "operands" else f"{net}, full attention, {kind}"
        axes.set_title(title, fontsize="small")
        axes.set(xlabel="step", ylabel="SQNR, dB")
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    shown = {label for lines in panels.values() for label, _ in lines}
    handles = [Line2D([], [], color=colour, label=label) for label, colour in _COLOURS.items() if label in shown]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize="small")
    figure.savefig(target, dpi=90)
    plt.close(figure)


def _panels(
    found: Mapping[Run, dict[str, Any]],
    table: Table,
    target: Path,
    size: str,
    draw: Callable[[Any, list[tuple[str, Run]]], None],
) -> None:
    """Draw a figure with a panel for each net of a table that has a finished run; without any, none."""
    there = [(label, run) for label, run in table.sized(size) if run in found and found[run]["final"] is not None]
    columns = list(dict.fromkeys(run.column for _, run in there))
    if not columns:
        return
    width = 4.5 * len(columns)
    figure, grid = plt.subplots(1, len(columns), figsize=(width, 3.5), layout="constrained", squeeze=False)
    for axes, column in zip(grid.flat, columns, strict=True):
        draw(axes, [(label, run) for label, run in there if run.column == column])
        axes.set_title(", ".join(column))
    figure.savefig(target, dpi=90)
    plt.close(figure)
