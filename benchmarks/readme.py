"""The README's tables, made from the committed results."""

import re
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import result
from benchmarks.study import summary

README = Path(__file__).parent.parent / "README.md"


def main(rounds: int) -> None:
    """Write the tables into the README."""
    README.write_text(with_tables(README.read_text()))


def with_tables(text: str) -> str:
    """The text with each block between "generated: NAME" and "end" made anew."""
    made = {name: make(result.read(name)) for name, make in _TABLES.items()}
    made["study"] = summary.markdown(result.RESULTS / "study")
    for name, content in made.items():
        block = f"<!-- generated: {name} -->\n{content}\n<!-- end -->"
        old = re.search(rf"<!-- generated: {name} -->\n.*?<!-- end -->", text, flags=re.DOTALL)
        assert old is not None, f"the README has no place for {name}"
        text = text.replace(old[0], block)
    return text


def _demo(found: dict[str, Any]) -> str:
    rows = [
        ["float", f"{found['float_accuracy']:.2%}", f"{found['float_ms']:.0f}", "1.00"],
        [
            "4 bits",
            f"{found['quantized_accuracy']:.2%}",
            f"{found['quantized_ms']:.0f}",
            f"{found['quantized_ms'] / found['float_ms']:.2f}",
        ],
    ]
    table = tabulate(rows, ["demo", "test accuracy", "ms / step (median)", "ratio"], "github", disable_numparse=True)
    return f"{_where(found)}: ResNet-18 on scikit-learn's digits, the same recipe twice.\n\n{table}"


def _step(found: dict[str, Any]) -> str:
    return _by_variant(found, "ms", "ms of one training step (ratio to the faster float)")


def _peers(found: dict[str, Any]) -> str:
    return _by_variant(found, "ms", "ms of one training step (ratio to the faster float)")


def _memory(found: dict[str, Any]) -> str:
    return _by_variant(found, "mb", "MB held for backward (ratio to float eager)")


def _compile(found: dict[str, Any]) -> str:
    return _by_variant(found, "seconds", "seconds to compile, cold (ratio to float Inductor)")


def _inference(found: dict[str, Any]) -> str:
    """Return a row for each variant and a column for each model: milliseconds, and how many times as fast as float."""
    models = list(dict.fromkeys(row["model"] for row in found["rows"]))
    variants = list(dict.fromkeys(row["variant"] for row in found["rows"]))
    cells = {(row["variant"], row["model"]): _times(row) for row in found["rows"]}
    rows = [[variant, *(cells[variant, model] for model in models)] for variant in variants]
    title = "ms of one batch (times as fast as float in the same runtime)"
    return f"{_where(found)}.\n\n{tabulate(rows, [title, *models], 'github', disable_numparse=True)}"


def _times(row: dict[str, Any]) -> str:
    return "fails" if row["ms"] is None or row["ratio"] is None else f"{row['ms']:.1f} ({row['ratio']:.2f})"


def _by_variant(found: dict[str, Any], unit: str, title: str) -> str:
    """A row per variant, a column per model."""
    models = list(dict.fromkeys(row["model"] for row in found["rows"]))
    variants = list(dict.fromkeys(row["variant"] for row in found["rows"]))
    cells = {(row["variant"], row["model"]): _cell(row, unit) for row in found["rows"]}
    rows = [[variant, *(cells[variant, model] for model in models)] for variant in variants]
    return f"{_where(found)}.\n\n{tabulate(rows, [title, *models], 'github', disable_numparse=True)}"


def _cell(row: dict[str, Any], unit: str) -> str:
    return "fails" if row[unit] is None else f"{row[unit]:.0f} ({row['ratio']:.2f})"


def _where(found: dict[str, Any]) -> str:
    environment = found["environment"]
    return f"{environment['cpu']}, torch {environment['torch']}, commit {environment['commit']}, {environment['date']}"


_TABLES = {
    "demo": _demo,
    "step": _step,
    "peers": _peers,
    "memory": _memory,
    "compile": _compile,
    "inference": _inference,
}
