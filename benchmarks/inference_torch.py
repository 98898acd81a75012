"""python -m benchmarks.inference_torch MODEL [BATCH] [--bits W A]: milliseconds of one call in PyTorch, one thread.

Variants run in turns in one process; each keeps its least CPU time of the calling thread, which other processes disturb
little. Read ratios only.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

import octav_fx
from octav_fx import Config, zoo
from octav_fx.deploy.convert import integer_layers

ROUNDS = 30


class Bert(nn.Module):
    """Two layers as in BERT-base, 768 wide with 12 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.0, activation="gelu", batch_first=True)
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """X [batch, tokens, 768] -> the same shape."""
        for layer in self.layers:
            x = layer(x)
        return x


def load(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    """A model in eval mode and its input: 128 tokens for "bert", else images of 224 px, channels last."""
    torch.manual_seed(0)
    if name == "bert":
        return Bert().eval(), torch.randn(batch, 128, 768)
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    model: Any = zoo.load(name).eval()
    return model.to(memory_format=torch.channels_last), x


def compiled(model: nn.Module, x: Tensor, backend: str, **options: Any) -> Callable[[Tensor], Any]:
    """A compiled model that has run once, with options of Inductor."""
    with inductor.patch(**options):
        function: Callable[[Tensor], Any] = torch.compile(model, backend=backend)
        function(x)
    return function


def variants(model: nn.Module, x: Tensor, bits: tuple[int, int]) -> dict[str, Callable[[Tensor], Any]]:
    """What is compared, by name, and warm."""
    q = octav_fx.quantize(model, x, Config(weight_bits=bits[0], activation_bits=bits[1]))
    octav_fx.freeze(octav_fx.calibrate(q, [x]))
    levels, integers = octav_fx.convert(q, integers=False), octav_fx.convert(q)
    floats = {site: reason for site, reason in integer_layers(integers) if reason is not None}
    print(f"in float: {floats or 'no layer'}", flush=True)
    return {
        "float eager": model,
        "float Inductor": compiled(model, x, "inductor"),
        "float Inductor, freezing": compiled(model, x, "inductor", freezing=True),
        "convert, levels": levels,
        "convert, integers": integers,
        "convert, integers, compiled": compiled(integers, x, "octav"),
    }


def measure(functions: dict[str, Callable[[Tensor], Any]], x: Tensor) -> dict[str, float]:
    """Milliseconds of each."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.thread_time()
            function(x)
            best[name] = min(best[name], 1e3 * (time.thread_time() - start))
    return best


@torch.no_grad()
def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("batch", type=int, nargs="?", default=4)
    parser.add_argument("--bits", type=int, nargs=2, default=(8, 8))
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, x = load(given.model, given.batch)
    found = measure(variants(model, x, tuple(given.bits)), x)
    print(json.dumps({"model": given.model, "batch": given.batch, "bits": given.bits, "ms": found}))


if __name__ == "__main__":
    main()
