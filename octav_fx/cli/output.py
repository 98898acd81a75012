"""Values as text and CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate


def as_text(values: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a line for each value, numbers with four digits."""
    lines = [["" if cell is None else cell for cell in value.values()] for value in values]
    return tabulate(lines, [name.replace("_", " ") for name in values[0]], floatfmt=".4g")


def as_csv(values: Sequence[Mapping[str, Any]]) -> str:
    """Return CSV with a line of names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(values[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(values)
    return text.getvalue().rstrip()
