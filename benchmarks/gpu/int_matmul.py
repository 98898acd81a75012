"""int_matmul of 4-bit codes against bfloat16 over shapes, by what holds the codes and with each pinned tile.

What configs.py is to be filled from; measured.json, which says where integers pay, is written from these rows.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from benchmarks.gpu.timing import median_ms
from octav_fx.ops.int_matmul.configs import Architecture, Config, architecture
from octav_fx.ops.int_matmul.measured import Measured
from octav_fx.ops.int_matmul.op import int_matmul
from octav_fx.ops.int_matmul.reference import OPERANDS

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
    """For each shape bfloat16, the op as it is pinned, and every other tile; ratio: time over that of bfloat16."""
    of = architecture(torch.device(device))
    for m, n, k in SHAPES if device == "cuda" else TINY:
        codes = [torch.randint(-8, 8, (rows, k), device=device).to(torch.int8) for rows in (m, n)]
        scale, scales, bias = torch.rand((), device=device), torch.rand(n, device=device), torch.randn(n, device=device)
        out = torch.empty(m, n, device=device, dtype=torch.bfloat16)
        # Random values: multiplying zeros takes less power, and less time.
        left, right = (torch.randn_like(of_one, dtype=torch.bfloat16) for of_one in codes)
        addend = bias.to(torch.bfloat16)
        base = median_ms(lambda: torch.addmm(addend, left, right.t(), out=out), device)  # noqa: B023  run at once
        shape = {"m": m, "n": n, "k": k}
        yield _row(shape, "bfloat16", base, base)
        for operand in OPERANDS if of.float8 else OPERANDS[:1]:
            x, w = (of_one.to(operand) for of_one in codes)
            args, name = (x, scale, w, scales, bias, 4, True, 4, torch.bfloat16), _name(operand)
            yield _row(shape, name, median_ms(lambda: int_matmul.out(*args, out=out), device), base)  # noqa: B023
            tiles = of.configs if operand is torch.int8 else of.float8
            for tile, way in _ways(tiles) if device == "cuda" else ():
                from octav_fx.ops.int_matmul import kernel

                ms = median_ms(lambda: kernel.int_matmul(*args, out=out, of=way), device)  # noqa: B023
                yield _row(shape, f"{name}, {tile}", ms, base)


def table(rows: Iterable[dict[str, Any]]) -> list[Measured]:
    """Return the ratios of the op, as they go into measured.json, for every shape that has one."""
    found: dict[tuple[int, int, int], dict[str, float]] = {}
    for row in rows:
        found.setdefault((row["m"], row["n"], row["k"]), {})[row["way"]] = row["ratio"]
    int8, float8 = map(_name, OPERANDS)
    return [Measured(*shape, ways[int8], ways.get(float8)) for shape, ways in found.items() if int8 in ways]


def _name(operand: torch.dtype) -> str:
    """torch.float8_e4m3fn -> float8."""
    return str(operand).removeprefix("torch.").partition("_")[0]


def _ways(tiles: Iterable[Config]) -> Iterator[tuple[str, Architecture]]:
    """Each tile by itself."""
    for config in tiles:
        tile = f"{config.block_m} x {config.block_n} x {config.block_k}"
        yield f"{tile}, {config.num_warps} warps, {config.num_stages} stages", Architecture((config,), float8=(config,))


def _row(shape: dict[str, int], way: str, ms: float, base: float) -> dict[str, Any]:
    tera = 2e-9 * shape["m"] * shape["n"] * shape["k"] / ms
    return {**shape, "way": way, "ms": round(ms, 5), "tera": round(tera, 1), "ratio": round(ms / base, 3)}
