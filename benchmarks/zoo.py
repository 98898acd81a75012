"""What octav_fx makes of the models that people have: captured or why not, how much of it, and whether it is right.

A process and a time limit for each model. Each result is kept at once, and what is kept is not measured again until
octav_fx or passes change, so that a run can be stopped anywhere and goes on where it was.
"""

import fnmatch
import re
import time
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from tabulate import tabulate

from benchmarks import forked, result, zoo_models, zoo_worker

# Seconds of CPU time.
MODEL_LIMIT = 120
_LIBRARIES = ("transformers", "timm", "torchvision")

Row = dict[str, Any]


def main(limit: float | None, only: str = "*") -> None:
    """Measure what is not in results/zoo.json yet, starting nothing that might take longer than limit seconds.

    only: a glob of "library/name".
    """
    end = float("inf") if limit is None else time.monotonic() + limit
    sources, entries, kept = result.sources(), zoo_models.entries(), _kept()
    # Of a library that is not installed here, rows and version stay.
    versions = {**kept["versions"], **{library: version(library) for library in {e.library for e in entries}}}
    rows = {(row["library"], row["name"]): row for row in kept["rows"] if row["sources"] == sources}
    left = [entry for entry in entries if (entry.library, entry.name) not in rows]
    chosen = [entry for entry in left if fnmatch.fnmatch(f"{entry.library}/{entry.name}", only)]
    while chosen and time.monotonic() + MODEL_LIMIT <= end:
        left.remove(entry := chosen.pop(0))
        rows[entry.library, entry.name] = row = measured(entry, sources)
        print(row["library"], row["name"], row.get("captured"), row.get("stopped", ""), flush=True)
        setting = {"bits": 4, "seconds per model": MODEL_LIMIT}
        result.write("zoo", {"setting": setting, "versions": versions, "rows": list(rows.values())})
    show(list(rows.values()))
    if left:
        print(f"\n{len(left)} of {len(entries)} models are left: run it again")


def measured(entry: zoo_models.Entry, sources: str) -> Row:
    """The row of one model; "sources" says of which state of octav_fx."""
    names = {"library": entry.library, "family": entry.family, "name": entry.name, "sources": sources}
    return names | forked.columns(zoo_worker.measure, entry, MODEL_LIMIT)


def show(rows: list[Row]) -> None:
    """Print every model, the families, and what stopped those that are not captured."""
    print(tabulate([_cells(row) for row in rows], headers="keys", floatfmt=".4f"))
    families = dict.fromkeys((row["library"], row["family"]) for row in rows)
    groups = [(library, "all") for library in _LIBRARIES if any(library == name for name, _ in families)]
    print("", tabulate([_summary(rows, *group) for group in [*families, *groups]], headers="keys"), sep="\n")
    causes = Counter(_cause(row) for row in rows if not _is_captured(row))
    print("", tabulate(causes.most_common(), headers=("not captured", "models")), sep="\n")


def _cells(row: Row) -> Row:
    off_grid, float_nodes = row.get("off grid", ""), row.get("float nodes")
    return {
        "library": row["library"],
        "family": row["family"],
        "model": row["name"],
        "captured": _short(row.get("captured", row.get("stopped"))),
        "share": row.get("share"),
        "parts": row.get("parts"),
        "seconds": row.get("seconds"),
        "float nodes": None if float_nodes is None else len(float_nodes),
        "contractions": row.get("contractions"),
        "off grid": sum(count for *_, count in off_grid) if isinstance(off_grid, list) else _short(off_grid),
        "uncounted": ", ".join(row.get("uncounted", ())),
        "float_mode equal": _short(row.get("float_mode equal")),
        "step": _short(row.get("step")),
        "graphs": _short(row.get("graphs")),
        "stopped": row.get("stopped", ""),
    }


def _summary(rows: list[Row], library: str, family: str) -> Row:
    """How many models of a family pass each column."""
    rows = [row for row in rows if row["library"] == library and family in ("all", row["family"])]
    return {
        "library": library,
        "family": family,
        "models": len(rows),
        "captured": _count(map(_is_captured, rows)),
        "in parts": _count(bool(row.get("parts")) for row in rows),
        "all MACs": _count(row.get("share") == 1 and not row.get("uncounted") for row in rows),
        "all on grid": _count(row.get("off grid") == [] for row in rows),
        "float_mode equal": _count(row.get("float_mode equal") is True for row in rows),
        "step finite": _count(row.get("step") == "finite" for row in rows),
        "one graph": _count(row.get("graphs") == 1 for row in rows),
        "slow": _count(map(_is_slow, rows)),
    }


def _count(passed: Iterable[bool]) -> int:
    return sum(passed)


def _is_captured(row: Row) -> bool:
    return row.get("captured") == "yes"


def _is_slow(row: Row) -> bool:
    """Tell whether quantize took longer than three seconds and ten forwards."""
    forward = row.get("forward seconds")
    return isinstance(forward, float) and row.get("seconds", 0.0) > 3 + 10 * forward


def _cause(row: Row) -> str:
    """A reason without what differs between models: where it was, and numbers."""
    text = re.sub(r"\S+\.py:\d+", "FILE", str(row.get("captured", row.get("stopped"))))
    return re.sub(r"\d+", "N", text)[:120]


def _short(value: Any) -> Any:
    return value if not isinstance(value, str) or len(value) <= 48 else value[:47] + "…"


def _kept() -> dict[str, Any]:
    return result.read("zoo") if (result.RESULTS / "zoo.json").exists() else {"versions": {}, "rows": []}
