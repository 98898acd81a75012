"""The levels of an activation's codes."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.bandwidth import activations, row
from octav_fx.formats.spec import integers
from octav_fx.ops.dequantize.op import dequantize
from octav_fx.ops.quantize.op import quantize


def measure(device: str) -> Iterator[dict[str, Any]]:
    """A row for each size and grid."""
    for of, copy in activations(device):
        quantize.out(of.x, of.clip, integers(of.bits, of.signed, None), out=of.codes)

        def run(of: Any = of) -> None:
            dequantize.out(of.codes, of.clip, integers(of.bits, of.signed, None), torch.bfloat16, out=of.out)

        yield row("dequantize", run, of, of.code_bytes + 2, copy, device)
