"""The codes of an activation."""

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.bandwidth import activations, row
from octav_fx.formats.spec import integers
from octav_fx.ops.quantize.op import quantize


def measure(device: str) -> Iterator[dict[str, Any]]:
    """A row for each size and grid."""
    for of, copy in activations(device):

        def run(of: Any = of) -> None:
            quantize.out(of.x, of.clip, integers(of.bits, of.signed, None), out=of.codes)

        yield row("quantize", run, of, 2 + of.code_bytes, copy, device)
