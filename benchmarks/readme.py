"""The tables of the README and the documentation, made from the committed results."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tabulate import tabulate

from benchmarks import result
from benchmarks.study import summary

ROOT: Final = Path(__file__).parent.parent
PAGES: Final = tuple(ROOT / name for name in ("README.md", "docs/results.md", "docs/study.md"))

# Files of ./dev gpu, one for each GPU.
_STEPS: Final = ("-resnet50", "-transformers")

# How the note of a row begins whose library is not there.
_ABSENT: Final = "not installed"

# What the README shows of the study's first table.
_SHOWN: Final = ("float", "octav", "octav-tight", "max", "lsq")


def main(rounds: int) -> None:
    """Write the tables into their pages."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))


def with_tables(text: str) -> str:
    """The text with each block between "generated: NAME" and "end" made anew."""

    def made(block: re.Match[str]) -> str:
        name = block[1]
        assert name in _TABLES, f"no table is named {name}"
        return f"<!-- generated: {name} -->\n{_TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- generated: (\w+) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


def _study() -> str:
    return summary.markdown(result.RESULTS / "study")


def _accuracy() -> str:
    """The first lines of the study: 4 bits, three seeds."""
    _, title, table, *_ = _study().split("\n\n")
    header, rule, *lines = table.splitlines()
    kept = [line for line in lines if line.split("|")[1].strip() in _SHOWN]
    return f"{title[:-1]}, small nets trained from scratch; mean, least and greatest.\n\n" + "\n".join(
        [header, rule, *kept]
    )


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
    """Return a table with memory as the C library has it, and one where freed memory stays with the process."""
    table, rows = _by_variant(found, "ms", "ms of one training step (ratio to the faster float)"), found["rows"]
    if not any(row.get("kept_ms") for row in rows):
        return table
    return f"{table}\n\n{_variants(rows, 'kept_ms', 'freed memory kept: ms (ratio)', 'kept_ratio')}"


def _memory(found: dict[str, Any]) -> str:
    return _by_variant(found, "mb", "MB held for backward (ratio to float eager)")


def _compile(found: dict[str, Any]) -> str:
    return _by_variant(found, "seconds", "seconds to compile, cold (ratio to float Inductor)")


def _inference(found: dict[str, Any]) -> str:
    """Return a table for each batch, a row for each variant and a column for each model: milliseconds, and a ratio."""
    tables = [_of_batch(found["rows"], batch) for batch in dict.fromkeys(row["batch"] for row in found["rows"])]
    return "\n\n".join([f"{_where(found)}.", *tables])


def _equal(found: dict[str, Any]) -> str:
    """Return a row for each runtime and bits and a column for each net: results, moved codes, accuracy."""
    nets = list(dict.fromkeys(row["net"] for row in found["rows"]))
    variants = list(dict.fromkeys((row["bits"], row["runtime"]) for row in found["rows"]))
    cells = {(row["bits"], row["runtime"], row["net"]): _equality(row) for row in found["rows"]}
    lines = [
        [f"{bits} {runtime}", *(cells.get((bits, runtime, net), "") for net in nets)] for bits, runtime in variants
    ]
    title = "equal results of 256, codes moved of a million, accuracy in %"
    return f"{_where(found)}.\n\n{tabulate(lines, [title, *nets], 'github', disable_numparse=True)}"


def _equality(row: dict[str, Any]) -> str:
    if row.get("note"):
        return _ABSENT
    accuracy = f"{100 * row['accuracy']:.1f}"
    if row["bits"] == "float":
        return accuracy
    moved = "0" if not row["moved"] else f"{1e6 * row['moved'] / row['codes']:.2g}"
    return f"{row['equal']}, {moved}, {accuracy}"


def _rows(found: dict[str, Any], part: str = "rows") -> str:
    """Return the rows as they are."""
    return f"{_where(found)}.\n\n{tabulate(found[part], 'keys', 'github')}"


def _gpu() -> str:
    """Return for each file of steps on a GPU where it is from, and a row for each model and variant."""
    found = [result.read(path.stem) for path in sorted(result.RESULTS.glob("*.json")) if path.stem.endswith(_STEPS)]
    return "\n\n".join(f"{_where_gpu(of)}.\n\n{tabulate(_steps_of(of), 'keys', 'github')}" for of in found)


def _where_gpu(found: dict[str, Any]) -> str:
    gpu, kernels = found["gpu"], f"tests of the kernels: {found['tests']}"
    return f"{gpu['name']}, triton {gpu['triton']}, CUDA {gpu['cuda']}; {_where(found)}; {kernels}"


def _steps_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    hidden = ("kernels", "note", "error")
    return [{key: value for key, value in row.items() if key not in hidden} for row in found["step"]["rows"]]


def _of_batch(rows: list[dict[str, Any]], batch: int) -> str:
    rows = [row for row in rows if row["batch"] == batch]
    models = list(dict.fromkeys(row["model"] for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    cells = {(row["variant"], row["model"]): _times(row) for row in rows}
    lines = [[variant, *(cells.get((variant, model), "") for model in models)] for variant in variants]
    title = f"ms of a batch of {batch} (times as fast as float in the same runtime)"
    return tabulate(lines, [title, *models], "github", disable_numparse=True)


def _times(row: dict[str, Any]) -> str:
    if row["note"].startswith(_ABSENT):
        return _ABSENT
    return "fails" if row["ms"] is None or row["ratio"] is None else f"{row['ms']:.1f} ({row['ratio']:.2f})"


def _by_variant(found: dict[str, Any], unit: str, title: str) -> str:
    return f"{_where(found)}.\n\n{_variants(found['rows'], unit, title, 'ratio')}"


def _variants(rows: list[dict[str, Any]], unit: str, title: str, ratio: str) -> str:
    """A row per variant, a column per model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    cells = {(row["variant"], row["model"]): _cell(row, unit, ratio) for row in rows}
    lines = [[variant, *(cells.get((variant, model), "") for model in models)] for variant in variants]
    return tabulate(lines, [title, *models], "github", disable_numparse=True)


def _cell(row: dict[str, Any], unit: str, ratio: str) -> str:
    return "fails" if row[unit] is None else f"{row[unit]:.0f} ({row[ratio]:.2f})"


def _where(found: dict[str, Any]) -> str:
    environment = found["environment"]
    return f"{environment['cpu']}, torch {environment['torch']}, commit {environment['commit']}, {environment['date']}"


def _of(name: str, make: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    return lambda: make(result.read(name))


_TABLES: Final[dict[str, Callable[[], str]]] = {
    "demo": _of("demo", _demo),
    "step": _of("step", _step),
    "peers": _of("peers", _step),
    "memory": _of("memory", _memory),
    "compile": _of("compile", _compile),
    "equal": _of("equal", _equal),
    "inference": _of("inference", _inference),
    "blocks": _of("blocks", _rows),
    "bytes": _of("bytes", _rows),
    "gpu": _gpu,
    "formats": _of("formats", _rows),
    "searched": _of("formats", functools.partial(_rows, part="searched")),
    "study": _study,
    "accuracy": _accuracy,
}
