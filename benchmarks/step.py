"""What a training step costs: float, octav, OCTAV as one would write it first, and other libraries.

Three models, 4 bits, SGD, one thread; float32, and float and octav under bf16 autocast. One process per model, variant
and round, rounds interleaved; the minimum over all steps counts, and ratios of minima, because a shared machine only
ever adds time. Each process measures twice: as it is, and where memory that is freed stays with it.
"""

from collections.abc import Iterable
from typing import Any

from tabulate import tabulate

from benchmarks import result, worker
from benchmarks.models import MODELS
from benchmarks.peers import PEERS
from benchmarks.variants import AUTOCAST, OWN, VARIANTS

FLOAT = ("float eager", "float Inductor")
# What is measured, and the ratio of it: with memory as glibc has it, and with freed memory kept.
UNITS = {"ms": "ratio", "kept_ms": "kept_ratio"}
# What a variant is compared with: the fastest of these that runs in its precision.
_FLOAT = (*FLOAT, "float Inductor, bf16 autocast")
# What a CPU without VNNI runs in another way.
_INTEGERS = (*FLOAT, "octav compiled", "octav compiled, integer")


def main(rounds: int) -> None:
    """Measure our own variants and write results/step.json; without VNNI those with integers, to a file of its own."""
    name = result.of_cpu("step")
    _measure(name, (*OWN, *AUTOCAST) if name == "step" else _INTEGERS, rounds)


def peers(rounds: int) -> None:
    """Measure the peers beside float and octav, and write results/peers.json."""
    _measure("peers", (*FLOAT, "octav compiled", *PEERS), rounds)


def _measure(name: str, variants: Iterable[str], rounds: int) -> None:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for model in MODELS:
            for variant in (name for name in variants if model in VARIANTS[name].models):
                found.setdefault((model, variant), []).append(worker.run("step", model, variant))
    rows = [_row(model, variant, answers) for (model, variant), answers in found.items()]
    for row in rows:
        for unit, ratio in UNITS.items():
            row[ratio] = row[unit] and round(row[unit] / _fastest_float(row, rows, unit), 3)
    setting = {
        "threads": 1,
        "rounds": rounds,
        "steps": worker.STEPS,
        "ratio": "to the fastest float variant of the same precision",
    }
    result.write(name, {"setting": setting, "rows": rows})
    print(tabulate(rows, headers="keys"))


def _fastest_float(row: dict[str, Any], rows: list[dict[str, Any]], unit: str) -> float:
    """The time of the same model in float, in the same precision."""
    autocast = VARIANTS[row["variant"]].autocast
    floats = [r for r in rows if r["variant"] in _FLOAT and VARIANTS[r["variant"]].autocast == autocast]
    return float(min(r[unit] for r in floats if r["model"] == row["model"]))


def _row(model: str, variant: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
    times = {unit: [answer[unit] for answer in answers if answer.get(unit) is not None] for unit in UNITS}
    errors = [answer["error"] for answer in answers if "error" in answer]
    note = PEERS[variant].note if variant in PEERS else ""
    fastest = {unit: round(min(found), 1) if found else None for unit, found in times.items()}
    return {"model": model, "variant": variant, **fastest, "note": errors[0] if errors else note}
