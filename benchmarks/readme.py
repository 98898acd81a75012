"""The README's tables, made from the committed results."""

import re
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import result

README = Path(__file__).parent.parent / "README.md"


def main(rounds: int) -> None:
    """Write the tables into the README."""
    README.write_text(with_tables(README.read_text()))


def with_tables(text: str) -> str:
    """The text with each block between "generated: NAME" and "end" made anew."""
    for name, make in {"demo": _demo, "step": _step}.items():
        block = f"<!-- generated: {name} -->\n{make(result.read(name))}\n<!-- end -->"
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
    setting = found["setting"]
    rows = [[row["variant"], f"{row['ms']:.0f}", f"{row['ratio']:.2f}"] for row in found["rows"]]
    table = tabulate(rows, ["eager training step", "ms (minimum)", "ratio"], "github", disable_numparse=True)
    what = f"ResNet-18, batch {setting['batch']}, {setting['pixels']} px, one thread, {setting['rounds']} rounds"
    return f"{_where(found)}: {what}.\n\n{table}"


def _where(found: dict[str, Any]) -> str:
    environment = found["environment"]
    return f"{environment['cpu']}, torch {environment['torch']}, commit {environment['commit']}, {environment['date']}"
