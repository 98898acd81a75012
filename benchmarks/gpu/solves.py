"""The ways to solve one tensor, by size and bits: what the constants of ops/optimal_clip/kernel.py are to be."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import median_ms

SIZES = tuple(2**power for power in (12, 14, 16, 18, 20, 22, 24, 27))
BITS = (4, 8)
# Of normal values, and of uniform ones, of which much lies above any bound.
DRAWS: dict[str, Callable[..., Tensor]] = {"normal": torch.randn, "uniform": torch.rand}


def measure(device: str) -> Iterator[dict[str, Any]]:
    """A row for each solve that takes the tensor, from a hint 2 % off; nothing where there is no GPU."""
    if device != "cuda":
        return
    from octav_fx.ops.kernels.solve_passes.kernel import solve_passes
    from octav_fx.ops.kernels.solve_rows.kernel import LONGEST, solve_rows
    from octav_fx.ops.kernels.solve_tail.kernel import solve_tail

    for elements in SIZES:
        for (draw, make), dtype in (
            (draw, dtype) for draw in DRAWS.items() for dtype in (torch.bfloat16, torch.float32)
        ):
            x, out = make(elements, device=device).to(dtype), torch.zeros((), device=device)
            for bits in BITS:
                solve_passes(x, torch.zeros_like(out), bits, True, "octav", out=out)
                hint = 1.02 * out
                ways: dict[str, Callable[[], bool]] = {
                    "tail": lambda: solve_tail(x, hint, bits, True, out=out),  # noqa: B023  run at once, as below
                    "passes": lambda: solve_passes(x, hint, bits, True, "octav", out=out),  # noqa: B023
                    "rows": lambda: solve_rows(x, hint, bits, True, None, "octav", out=out),  # noqa: B023
                }
                for way, run in ways.items():
                    if way == "rows" and elements > 4 * LONGEST:
                        continue
                    yield {
                        "solve": way,
                        "elements": elements,
                        "values": draw,
                        "bits": bits,
                        "ms": round(median_ms(run, device, repeats=10), 5),
                    }
