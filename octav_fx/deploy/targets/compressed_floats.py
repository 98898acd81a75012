"""Weights of compressed-tensors in small floats: E2M1 and E4M3 in groups, under scales of a byte."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from octav_fx.formats.packing import pack
from octav_fx.formats.scales import tensor_scale
from octav_fx.nn import StoredWeight

# A byte b stands for 2 ** (b - 127).
_BIAS: Final = 127


@dataclass(frozen=True, slots=True)
class FloatKind:
    """What the format calls a spec of weights, what it says of it, and the tensors of a weight [out, in]."""

    name: str
    arguments: Mapping[str, Any]
    stored: Callable[[StoredWeight, Tensor], dict[str, Tensor]]


def nibbles(codes: Tensor) -> Tensor:
    """Return E2M1 of codes -7 .. 7 [...], int8: the sign above the place among the magnitudes."""
    return codes.abs() | (codes < 0).to(torch.int8) << 3


def exponents(scale: Tensor) -> Tensor:
    """Return the byte of each power of two; of a scale that is zero, and whose codes are, the least."""
    power = torch.frexp(scale).exponent - 1 + _BIAS
    return torch.where(scale > 0, power, 0).to(torch.uint8)


def _pairs(weight: StoredWeight) -> Tensor:
    """Return two codes to a byte [out, in / 2]; groups are of an even size."""
    codes = nibbles(weight.integers())
    return pack(codes).reshape(len(codes), -1)


def _nvfp4(weight: StoredWeight, values: Tensor) -> dict[str, Tensor]:
    unit = tensor_scale(values.detach().float(), weight.spec.format)
    scale = torch.where(unit > 0, weight.scale / unit, 0).to(torch.float8_e4m3fn)
    # Scales are divided by it. A weight of zeros has none.
    above = torch.where(unit > 0, 1 / unit, 1).reshape(1)
    return {"weight_packed": _pairs(weight), "weight_scale": scale, "weight_global_scale": above}


def _mxfp4(weight: StoredWeight, values: Tensor) -> dict[str, Tensor]:
    return {"weight_packed": _pairs(weight), "weight_scale": exponents(weight.scale)}


def _mxfp8(weight: StoredWeight, values: Tensor) -> dict[str, Tensor]:
    levels = weight.spec.format.levels(weight.integers().float())
    return {"weight": levels.to(torch.float8_e4m3fn), "weight_scale": exponents(weight.scale)}


def _arguments(bits: int, size: int, strategy: str, scale: str) -> dict[str, Any]:
    of_groups = {"strategy": strategy, "group_size": size, "dynamic": False, "scale_dtype": f"torch.{scale}"}
    return {"num_bits": bits, "type": "float", "symmetric": True, **of_groups}


# Spec -> kind.
FLOATS: Final = {
    "e2m1/group-16.1/e4m3": FloatKind(
        "nvfp4-pack-quantized", _arguments(4, 16, "tensor_group", "float8_e4m3fn"), _nvfp4
    ),
    "e2m1/group-32.1/e8m0": FloatKind("mxfp4-pack-quantized", _arguments(4, 32, "group", "uint8"), _mxfp4),
    "e4m3/group-32.1/e8m0": FloatKind("mxfp8-quantized", _arguments(8, 32, "group", "uint8"), _mxfp8),
}
