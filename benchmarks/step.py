"""What one eager training step costs: float, octav, and OCTAV as ten cold Newton steps in plain PyTorch.

ResNet-18, batch 16, 96 px, SGD, one thread. One process per variant and round, rounds interleaved; the minimum over
all steps counts, and ratios of minima, because a shared machine only ever adds time.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from benchmarks import result
from octav_fx import zoo
from octav_fx.ops import FakeQuantizer, Spec
from octav_fx.quant.axis import along, to_rows
from octav_fx.quant.gradient import GRADIENTS
from octav_fx.quant.grid import Grid

BATCH, SIZE = 16, 96
WARM_UP, STEPS = 3, 8


class _Plain(torch.autograd.Function):
    """Eq. 6 ten times from the mean, then rounding, as one would write it first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: Spec) -> Tensor:
        grid = Grid(spec.bits, spec.signed)
        rows = to_rows(x, spec.dim)
        magnitude = rows.abs()
        clip = magnitude.sum(-1) / (magnitude > 0).sum(-1).clamp(min=1)
        for _ in range(10):
            above = magnitude > clip.unsqueeze(-1)
            inside = ((magnitude > 0) & ~above).sum(-1)
            clip = (magnitude * above).sum(-1) / (grid.noise * inside + above.sum(-1))
        bound = along(clip if spec.dim is not None else clip.reshape(()), x, spec.dim)
        ctx.save_for_backward(x, bound)
        ctx.spec = spec
        step = grid.step(bound)
        return (x / step).round().clamp(grid.low, grid.high) * step

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, bound = ctx.saved_tensors
        return grads[0] * GRADIENTS[ctx.spec.gradient](x, bound, ctx.spec.signed), None


class _PlainQuantizer(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor) -> Any:
        return _Plain.apply(x, self.spec)


def _octav(model: nn.Module, x: Tensor) -> nn.Module:
    return octav_fx.quantize(model, x)


def _plain(model: nn.Module, x: Tensor) -> nn.Module:
    quantized = octav_fx.quantize(model, x)
    for name, module in list(quantized.named_modules()):
        if isinstance(module, FakeQuantizer):
            quantized.set_submodule(name, _PlainQuantizer(module.spec))
    return quantized


VARIANTS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "float eager": lambda model, x: model,
    "octav eager": _octav,
    "ten cold Newton steps, plain PyTorch eager": _plain,
}


def main(rounds: int) -> None:
    """Measure every variant and write results/step.json."""
    best: dict[str, float] = dict.fromkeys(VARIANTS, float("inf"))
    for number in range(rounds):
        for variant in VARIANTS:
            print(f"round {number + 1} of {rounds}: {variant}", file=sys.stderr, flush=True)
            best[variant] = min(best[variant], _in_process(variant))
    rows = [{"variant": v, "ms": round(ms, 1), "ratio": round(ms / best["float eager"], 3)} for v, ms in best.items()]
    setting = {"model": "resnet18", "batch": BATCH, "pixels": SIZE, "threads": 1, "rounds": rounds, "steps": STEPS}
    result.write("step", {"setting": setting, "rows": rows})
    print(tabulate(rows, headers="keys"))


def _in_process(variant: str) -> float:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.step", variant]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure(variant: str) -> float:
    """Milliseconds of the fastest training step of one variant, in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, target = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(0, 1000, (BATCH,))
    model = VARIANTS[variant](zoo.load("resnet18"), x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    best = float("inf")
    for number in range(WARM_UP + STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        if number >= WARM_UP:
            best = min(best, time.perf_counter() - start)
    return best * 1e3


if __name__ == "__main__":
    print(measure(sys.argv[1]))
