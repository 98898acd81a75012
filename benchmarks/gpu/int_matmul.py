"""int_matmul against bfloat16 over shapes, with each tile that may be pinned: what configs.py is to be filled from."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.timing import median_ms
from octav_fx.ops.int_matmul.configs import Architecture, architecture
from octav_fx.ops.int_matmul.op import int_matmul

# M, N, K of matmuls in ResNet-50 (1 x 1), ViT-B/16 and BERT-base, and squares.
SHAPES = (
    (50176, 1024, 256),
    (12544, 2048, 512),
    (25216, 2304, 768),
    (25216, 3072, 768),
    (25216, 768, 3072),
    (12288, 768, 768),
    (12288, 3072, 768),
    (12288, 768, 3072),
    *((size, size, size) for size in (1024, 2048, 4096, 8192)),
)
TINY = ((64, 64, 64),)


def measure(device: str) -> Iterator[dict[str, Any]]:
    """For each shape bfloat16, the op as it is pinned, and every other way; ratio: time over that of bfloat16."""
    for m, n, k in SHAPES if device == "cuda" else TINY:
        x, w = (torch.randint(-128, 128, (rows, k), device=device).to(torch.int8) for rows in (m, n))
        scale, scales, bias = torch.rand((), device=device), torch.rand(n, device=device), torch.randn(n, device=device)
        out = torch.empty(m, n, device=device, dtype=torch.bfloat16)
        args = (x, scale, w, scales, bias, 8, True, 8, torch.bfloat16)
        # Random values: multiplying zeros takes less power, and less time.
        left, right = (torch.randn_like(codes, dtype=torch.bfloat16) for codes in (x, w))
        addend = bias.to(torch.bfloat16)
        base = median_ms(lambda: torch.addmm(addend, left, right.t(), out=out), device)  # noqa: B023  run at once
        shape = {"m": m, "n": n, "k": k}
        yield _row(shape, "bfloat16", base, base)
        yield _row(shape, "int_matmul", median_ms(lambda: int_matmul.out(*args, out=out), device), base)  # noqa: B023
        for name, of in _ways(device):
            from octav_fx.ops.int_matmul import kernel

            ms = median_ms(lambda: kernel.int_matmul(*args, out=out, of=of), device)  # noqa: B023
            yield _row(shape, name, ms, base)


def _ways(device: str) -> Iterator[tuple[str, Architecture]]:
    """Every pinned tile of this architecture, as integers."""
    if device != "cuda":
        return
    for config in architecture(torch.device("cuda", 0)).configs:
        tile = f"{config.block_m} x {config.block_n} x {config.block_k}"
        yield f"{tile}, {config.num_warps} warps, {config.num_stages} stages", Architecture((config,))


def _row(shape: dict[str, int], way: str, ms: float, base: float) -> dict[str, Any]:
    tera = 2e-9 * shape["m"] * shape["n"] * shape["k"] / ms
    return {**shape, "way": way, "ms": round(ms, 5), "tera": round(tera, 1), "ratio": round(ms / base, 3)}
