"""What is held for backward between forward and backward, besides parameters, buffers and the batch."""

from tabulate import tabulate

from benchmarks import result, worker
from benchmarks.models import MODELS
from benchmarks.variants import OWN, VARIANTS


def main(rounds: int) -> None:
    """Count once (it does not vary), and write results/memory.json."""
    rows = []
    for model in MODELS:
        eager = worker.run("memory", model, "float eager")["mb"]
        for variant in (name for name in OWN if model in VARIANTS[name].models):
            answer = worker.run("memory", model, variant)
            mb = answer.get("mb")
            row = {"model": model, "variant": variant, "mb": mb and round(mb, 1), "ratio": mb and round(mb / eager, 3)}
            rows.append({**row, "note": answer.get("error", "")})
    result.write("memory", {"rows": rows})
    print(tabulate(rows, headers="keys"))
