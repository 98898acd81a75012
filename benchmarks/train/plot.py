"""Curves and errors as pictures, from the files that hold them."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402


def curve(source: Path, target: Path, title: str, score: str) -> None:
    """Loss and score over the steps of a run's CSV."""
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
