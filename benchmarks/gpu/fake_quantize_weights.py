"""All weights of a network at once, and one by one."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.timing import median_ms
from octav_fx.formats.spec import integers
from octav_fx.ops.fake_quantize_weights.op import fake_quantize_weights, one_by_one

# Of ResNet-50: output channels, elements of one, and how many such weights; and of twelve layers of ViT-B/16.
_RESNET = (
    *((64, 64, 1), (64, 576, 3), (256, 64, 4), (64, 256, 2), (128, 256, 1), (128, 1152, 4), (512, 128, 4)),
    *((128, 512, 3), (512, 256, 1), (256, 512, 1), (256, 2304, 6), (1024, 256, 6), (256, 1024, 5), (1024, 512, 1)),
    *((512, 1024, 1), (512, 4608, 3), (2048, 512, 3), (512, 2048, 2), (2048, 1024, 1), (64, 147, 1), (1000, 2048, 1)),
)
_VIT = ((2304, 768, 12), (768, 768, 12), (3072, 768, 12), (768, 3072, 12))
NETWORKS = {"ResNet-50": _RESNET, "ViT-B/16": _VIT}
TINY = {"tiny": ((4, 9, 2), (2, 40, 1))}


def measure(device: str) -> Iterator[dict[str, Any]]:
    """Two rows for each network and method, from hints 2 % off."""
    for network, shapes in (NETWORKS if device == "cuda" else TINY).items():
        weights = [torch.randn(rows, n, device=device) for rows, n, count in shapes for _ in range(count)]
        specs = [integers(4, True, 0)] * len(weights)
        for method in ("octav", "octav-grid"):
            cold = [torch.zeros(len(w), device=device) for w in weights]
            clips = one_by_one(weights, cold, specs, method)[1]
            hints = list((1.02 * clips).split([len(w) for w in weights]))
            for name, run in (("at once", fake_quantize_weights), ("one by one", one_by_one)):
                ms = median_ms(lambda: run(weights, hints, specs, method), device)  # noqa: B023  run at once
                yield {
                    "op": "fake_quantize_weights",
                    "how": name,
                    "network": network,
                    "method": method,
                    "elements": sum(w.numel() for w in weights),
                    "ms": round(ms, 5),
                }
