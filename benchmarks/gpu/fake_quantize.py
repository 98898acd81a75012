"""An activation on its grid, and the gradient of that."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.bandwidth import activations, row
from octav_fx.formats.spec import integers
from octav_fx.ops.fake_quantize.op import fake_quantize, fake_quantize_backward


def measure(device: str) -> Iterator[dict[str, Any]]:
    """Two rows for each size and grid."""
    for of, copy in activations(device):
        gradient = torch.randn_like(of.x)

        def forward(of: Any = of) -> None:
            fake_quantize.out(of.x, of.clip, integers(of.bits, of.signed, None), "pwl", out=of.out)

        def backward(of: Any = of, gradient: Any = gradient) -> None:
            fake_quantize_backward.out(gradient, of.x, of.clip, integers(4, of.signed, None), "pwl", out=of.out)

        yield row("fake_quantize", forward, of, 4, copy, device)
        yield row("fake_quantize_backward", backward, of, 6, copy, device)
