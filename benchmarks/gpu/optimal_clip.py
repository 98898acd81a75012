"""The solve of an activation from a hint 2 % off, alone and with its quantization; of weights, by output channel."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.bandwidth import activations, row
from benchmarks.gpu.timing import median_ms
from octav_fx.formats.spec import integers
from octav_fx.ops.optimal_clip.op import optimal_clip
from octav_fx.ops.quantize.op import quantize

# Of ResNet-50, ViT-B/16 and larger.
WEIGHTS = ((64, 64), (512, 4608), (768, 3072), (4096, 4096))


def measure(device: str) -> Iterator[dict[str, Any]]:
    """A row for each size and grid, and then for each weight."""
    for of, copy in activations(device):
        hint = of.clip * 1.02

        def solve(of: Any = of, hint: Any = hint) -> Any:
            return optimal_clip(of.x, hint, integers(of.bits, of.signed, None), "octav")

        def both(of: Any = of, solve: Any = solve) -> None:
            quantize.out(of.x, solve(), integers(of.bits, of.signed, None), out=of.codes)

        yield row("optimal_clip", solve, of, 2, copy, device)
        yield row("optimal_clip and quantize", both, of, 4 + of.code_bytes, copy, device)
    for shape in WEIGHTS if device == "cuda" else WEIGHTS[:1]:
        w = torch.randn(shape, device=device)
        hint = optimal_clip(w, torch.zeros(shape[0], device=device), integers(4, True, 0), "octav") * 1.02
        ms = median_ms(lambda: optimal_clip(w, hint, integers(4, True, 0), "octav"), device)  # noqa: B023  run at once
        yield {"op": "optimal_clip", "weight": list(shape), "bits": 4, "ms": round(ms, 5)}
