"""python -m benchmarks.gpu.worker QUESTION DEVICE [...]: one question in a process of its own, a line of JSON a row.

A step, of a model and a variant, is prepared, says so, and is timed when a line comes.
"""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu import (
    dequantize,
    fake_quantize,
    fake_quantize_weights,
    int_matmul,
    limited,
    optimal_clip,
    quantize,
    solves,
    step,
)

KERNELS: dict[str, Callable[[str], Iterator[dict[str, Any]]]] = {
    "optimal_clip": optimal_clip.measure,
    "quantize": quantize.measure,
    "dequantize": dequantize.measure,
    "fake_quantize": fake_quantize.measure,
    "fake_quantize_weights": fake_quantize_weights.measure,
    "int_matmul": int_matmul.measure,
    "solves": solves.measure,
}


def _answer(question: str, device: str, rest: list[str]) -> Iterator[dict[str, Any]]:
    if question in KERNELS:
        # Weights and codes have no gradient here, and an op's out= has none either.
        with torch.no_grad():
            yield from KERNELS[question](device)
    else:
        model, variant = rest
        yield from step.measure(model, variant, device, hold=_hold)


def _hold() -> None:
    print(limited.READY, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    _question, _device, *_rest = sys.argv[1:]
    for _row in _answer(_question, _device, _rest):
        print(json.dumps(_row), flush=True)
