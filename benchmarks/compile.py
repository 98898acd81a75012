"""How long the first forward and backward take with empty caches: Dynamo, AOTAutograd, Inductor, C++ compiler."""

import tempfile

from tabulate import tabulate

from benchmarks import result, worker
from benchmarks.models import MODELS

VARIANTS = ("float Inductor", "octav compiled")


def main(rounds: int) -> None:
    """Measure, and write results/compile.json."""
    seconds: dict[tuple[str, str], float] = {}
    for _ in range(rounds):
        for model in MODELS:
            for variant in VARIANTS:
                with tempfile.TemporaryDirectory() as cache:
                    answer = worker.run("compile", model, variant, TORCHINDUCTOR_CACHE_DIR=cache)
                seconds[model, variant] = min(answer["seconds"], seconds.get((model, variant), float("inf")))
    rows = [
        {
            "model": model,
            "variant": variant,
            "seconds": round(best, 1),
            "ratio": round(best / seconds[model, "float Inductor"], 3),
        }
        for (model, variant), best in seconds.items()
    ]
    result.write("compile", {"setting": {"rounds": rounds, "threads": 1}, "rows": rows})
    print(tabulate(rows, headers="keys"))
