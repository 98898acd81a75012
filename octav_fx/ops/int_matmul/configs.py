"""What is pinned instead of tuned at run time: the tile of each shape class, and where integers pay.

Where they pay is measured (measured.py), by the GPU's name. For a GPU that was not, it follows from counting, as the
tiles do: these are as large as registers and shared memory allow without a spill, and the sizes from which integers pay
are those below which published kernels gain nothing. benchmarks/gpu measures both.
"""

import functools
from dataclasses import dataclass
from typing import Final

import torch

from octav_fx.ops.int_matmul.measured import nearest


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
    faster way for int8. float8: tiles of codes in float8, of whole slices of K; none where it is not known that tensor
    cores add up a slice exactly (range.py). pays: the least M, N and K for which codes beat bfloat16; None: never.
    """

    configs: tuple[Config, ...]
    halves: bool = False
    float8: tuple[Config, ...] = ()
    pays: tuple[int, int, int] | None = None


_MEDIUM: Final = Config(128, 128, 128, num_warps=8, num_stages=3)
_SMALL: Final = Config(64, 64, 128, num_warps=4, num_stages=4)

ARCHITECTURES: Final = {
    # mma.sync of int8 at twice the rate of bfloat16.
    "sm_80": Architecture((_MEDIUM, _SMALL), pays=(2048, 1024, 1024)),
    # wgmma, likewise, of int8 and of float8.
    "sm_90": Architecture(
        (Config(128, 256, 128, num_warps=16, num_stages=3), _MEDIUM, _SMALL),
        # Two sums, of the slice and in float32: those of the widest tile do not fit the registers.
        float8=(_MEDIUM, _SMALL),
        pays=(2048, 1024, 1024),
    ),
    # Triton has tcgen05 for floating point only; int8 goes through mma.sync. How it adds up float8 is not known here.
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


def declined(operand: torch.dtype, device: torch.device, m: int, n: int, k: int) -> str | None:
    """Return why a matmul of this size is not multiplied from codes in operand on this GPU; None if that pays."""
    float8 = operand is torch.float8_e4m3fn
    of = architecture(device)
    if float8 and not of.float8:
        return f"no exact sum of float8 is known for {_family(device)}"
    if k % 16:
        # Else every row begins at another alignment, and loads become narrow.
        return f"K = {k} is no multiple of 16"
    if (found := nearest(_gpu(device), m, n, k)) is not None:
        ratio = found.float8 if float8 else found.int8
        if ratio is None or ratio >= 1:
            return f"{operand} took {ratio} of bfloat16's time for [{found.m}, {found.k}] times [{found.k}, {found.n}]"
        return f"int8 took {found.int8 / ratio:.2f} of float8's time" if float8 and found.int8 < ratio else None
    if of.pays is None:
        return f"no gain from integers is known for {_family(device)}"
    if any(size < least for size, least in zip((m, n, k), of.pays, strict=True)):
        return f"[{m}, {k}] times [{k}, {n}] is below {of.pays}, where integers begin to pay"
    return None


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units; one in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _family(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, _ = torch.cuda.get_device_capability(device)
    return f"sm_{major}0"
