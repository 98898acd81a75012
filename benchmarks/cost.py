"""How the cost of a quantizer grows: with the size of a tensor, and beside the matmul that it serves."""

import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks import result, worker
from benchmarks.least import least_time
from octav_fx.formats.grid import Grid
from octav_fx.formats.spec import integers, spec_of
from octav_fx.ops.dequantize.op import dequantize
from octav_fx.ops.fake_quantize.op import fake_quantize, fake_quantize_backward
from octav_fx.ops.optimal_clip.op import optimal_clip
from octav_fx.ops.quantize.op import quantize
from octav_fx.ops.quantize_rows.op import quantize_rows

SIZES = tuple(2**power for power in range(16, 25, 2))
WIDTHS = (128, 256, 512, 1024)
# Of a matrix 512 x 512: tokens, groups, and blocks with small scales.
ROW_SPECS = ("int8/token.1", "int4/token.1", "int4/group-32.1", "e2m1/group-32.1/e8m0", "e2m1/group-16.1/e4m3")


def main(rounds: int) -> None:
    """Measure both, and write results/cost.json."""
    sizes = [_size(elements) for elements in SIZES]
    widths = [_width(width, rounds) for width in WIDTHS]
    rows = [_rows(spec, rounds) for spec in ROW_SPECS]
    tables = {"sizes": sizes, "widths": widths, "quantize_rows": rows}
    result.write("cost", {"setting": {"threads": 1, "rounds": rounds}, **tables})
    print(*(tabulate(table, headers="keys") for table in tables.values()), sep="\n\n")


def _size(elements: int) -> dict[str, Any]:
    """Nanoseconds per element of each pass over an activation at 4 bits, from a hint 2 % off."""
    torch.set_num_threads(1)
    x = torch.randn(elements).relu()
    clip = optimal_clip(x, torch.tensor(0.0), integers(4, False, None), "octav")
    codes, y = torch.empty_like(x, dtype=Grid(4, False).codes_dtype), torch.empty_like(x)
    passes: dict[str, Callable[[], Tensor]] = {
        "solve": lambda: optimal_clip(x, clip * 1.02, integers(4, False, None), "octav"),
        "quantize": lambda: quantize.out(x, clip, integers(4, False, None), out=codes),
        "dequantize": lambda: dequantize.out(codes, clip, integers(4, False, None), torch.float32, out=y),
        "gradient": lambda: fake_quantize_backward.out(x, x, clip, integers(4, False, None), "pwl", out=y),
        "copy": lambda: y.copy_(x),
    }
    return {"elements": elements} | {
        name: round(least_time(run, clock=time.perf_counter) / elements * 1e9, 3) for name, run in passes.items()
    }


def _width(width: int, rounds: int) -> dict[str, Any]:
    """A step of four linear layers of one width, float and octav."""
    best = {"float eager": float("inf"), "octav compiled": float("inf")}
    for _ in range(rounds):
        for variant in best:
            best[variant] = min(best[variant], worker.run("step", f"mlp-{width}", variant)["ms"])
    ratio = best["octav compiled"] / best["float eager"]
    return {"width": width, **{k: round(v, 2) for k, v in best.items()}, "overhead": round(ratio - 1, 3)}


def _rows(spec: str, rounds: int) -> dict[str, Any]:
    """Nanoseconds per element of clips and of what is rounded to them: in one pass, quantize_rows, and in two."""
    torch.set_num_threads(1)
    x, hint, codes = torch.randn(512, 512), torch.zeros(()), spec_of(spec).format.codes_dtype
    ways: dict[str, Callable[[], object]] = {
        "levels": lambda: quantize_rows(x, spec, "octav", x.dtype),
        "levels in two": lambda: fake_quantize(x, optimal_clip(x, hint, spec, "octav"), spec, "ste"),
        "codes": lambda: quantize_rows(x, spec, "octav", codes),
        "codes in two": lambda: quantize(x, optimal_clip(x, hint, spec, "octav"), spec),
    }
    return {"spec": spec} | {name: round(least_time(run, rounds) / x.numel() * 1e9, 2) for name, run in ways.items()}
