"""What is pinned instead of tuned at run time: the tile of each shape class, and where integers pay.

None of it has been measured. It follows from counting: tiles are as large as registers and shared memory allow without
a spill, and the sizes from which integers pay are those below which published kernels gain nothing. benchmarks/gpu
measures both; its results belong here.
"""

import functools
from dataclasses import dataclass
from typing import Final

import torch


@dataclass(frozen=True, slots=True)
class Config:
    """A tile of the result, the stretch of K that is multiplied at once, and what a program consists of."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """How a family of GPUs multiplies codes.

    configs: from the largest tile to the smallest. halves: in half precision where that is exact, because there is no
    faster way for int8. pays: the least M, N and K for which an integer matmul beats one in bfloat16; None: never.
    """

    configs: tuple[Config, ...]
    halves: bool = False
    pays: tuple[int, int, int] | None = None


_MEDIUM: Final = Config(128, 128, 128, num_warps=8, num_stages=3)
_SMALL: Final = Config(64, 64, 128, num_warps=4, num_stages=4)

ARCHITECTURES: Final = {
    # mma.sync of int8 at twice the rate of bfloat16.
    "sm_80": Architecture((_MEDIUM, _SMALL), pays=(2048, 1024, 1024)),
    # wgmma, likewise.
    "sm_90": Architecture(
        (Config(128, 256, 128, num_warps=16, num_stages=3), _MEDIUM, _SMALL), pays=(2048, 1024, 1024)
    ),
    # Triton has tcgen05 for floating point only; int8 goes through mma.sync.
    "sm_100": Architecture((_MEDIUM, _SMALL), halves=True),
    # 64 KiB of shared memory.
    "gfx942": Architecture((Config(128, 128, 64, num_warps=8, num_stages=2), Config(64, 64, 64, 4, 2))),
}
# Any other GPU, and the interpreter.
_OTHER: Final = Architecture((Config(64, 64, 64, num_warps=4, num_stages=2),))


def architecture(device: torch.device) -> Architecture:
    """Return that of a device; compute capabilities 8.x are sm_80, and so on."""
    return ARCHITECTURES.get(_family(device), _OTHER)


def choose(configs: tuple[Config, ...], m: int, n: int, processors: int) -> Config:
    """Return the largest tile of which there is one for each processor, or the smallest."""
    for config in configs:
        if -(-m // config.block_m) * -(-n // config.block_n) >= processors:
            return config
    return configs[-1]


def declined(device: torch.device, m: int, n: int, k: int) -> str | None:
    """Return why a matmul of this size stays in floating point on this GPU; None if integers pay."""
    pays = architecture(device).pays
    if pays is None:
        return f"no gain from integers is known for {_family(device)}"
    if any(size < least for size, least in zip((m, n, k), pays, strict=True)):
        return f"[{m}, {k}] times [{k}, {n}] is below {pays}, where integers begin to pay"
    # Else every row begins at another alignment, and loads become narrow.
    return f"K = {k} is no multiple of 16" if k % 16 else None


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units; one in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _family(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, _ = torch.cuda.get_device_capability(device)
    return f"sm_{major}0"
