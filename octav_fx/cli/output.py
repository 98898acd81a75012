"""Values as text and CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate


def as_text(values: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a line for each value, numbers with four digits; without the columns that no value has."""
    used = [name for name in values[0] if any(value[name] is not None for value in values)]
    lines = [["" if value[name] is None else value[name] for name in used] for value in values]
    return tabulate(lines, [name.replace("_", " ") for name in used], floatfmt=".4g")


def as_csv(values: Sequence[Mapping[str, Any]]) -> str:
    """Return CSV with a line of names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(values[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(values)
    return text.getvalue().rstrip()
