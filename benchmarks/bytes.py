"""How many bytes a quantizer moves on a GPU beyond float Inductor, counted in what Inductor generates; nothing runs.

Two steps are compiled for a GPU that is not there (absent_gpu.py), under bf16 autocast: of octav and of float. What all
their kernels read and write is counted for two batches, and the difference of the differences is what an element of an
activation costs: what weights cost falls out. An op of octav's counts as if it read each input once, which solve_tail
does in half precision.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from benchmarks import result
from benchmarks.absent_gpu import Generated, generated, launches
from octav_fx import Config

BATCHES: Final = (8, 16)
# Layers: what is saved of the first and for the last matters less in a deeper net.
DEPTH: Final = 4
# Without edges of 8 bits, which are few in a deep net and many in these.
CONFIG: Final = Config(edge_bits=None)


class Block(nn.Module):
    """A layer of a transformer, 64 wide with 4 heads, as timm and transformers write it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(64), nn.LayerNorm(64)
        self.query, self.key, self.value, self.out = (nn.Linear(64, 64) for _ in range(4))
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        """X [batch, tokens, 64] -> the same."""
        normed = self.before(x)
        heads = [layer(normed).unflatten(2, (4, 16)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Layer(nn.Sequential):
    """A convolution with what stands behind it in a residual net: [batch, 32, rows, columns] -> the same."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())


# What is kept, and how clips are solved.
WAYS: Final = (("codes", "exact"), ("levels", "exact"), ("codes", "step"), ("levels", "step"))


def _tokens(batch: int) -> Tensor:
    return torch.randn(batch, 32, 64)


# The layer that a net repeats, a batch, and how it is quantized.
NETS: Final[dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], Config]]] = {
    "convolutions": (Layer, lambda batch: torch.randn(batch, 32, 16, 16).to(memory_format=torch.channels_last), CONFIG),
    "transformer": (Block, _tokens, CONFIG),
    # Codes of 8 bits take two bytes.
    "transformer, w4a8-g32-token": (Block, _tokens, Config.preset("w4a8-g32-token")),
}


@dataclass(frozen=True, slots=True)
class Beyond:
    """What one element of a quantized activation costs beyond float, in bytes, and one quantizer in launches."""

    forward: float
    backward: float
    launches: float
    # How many quantizers that is the mean of.
    quantizers: int


def beyond(net: str, depth: int, **options: str) -> Beyond:
    """Compile both steps for both batches, and count. options: of the backend."""
    small, large = (
        generated(octav_fx.quantize(model, batch, NETS[net][2]), batch, options=options, autocast=True)
        for model, batch in _steps(net, depth)
    )
    small_float, large_float = _of_float(net, depth)
    elements = sum(large[0].activations) - sum(small[0].activations)
    forward, backward = (
        ((large[i].bytes - small[i].bytes) - (large_float[i].bytes - small_float[i].bytes)) / elements for i in (0, 1)
    )
    launched, quantizers = launches(large[0]), len(large[0].activations)
    kernels = len(launched.kernels) - len(launches(large_float[0]).kernels)
    # A solve fills its bins and runs twice (solve_tail). Weights are one launch in all; a single one is a solve. Tokens
    # and groups are a launch for each tensor.
    solves = 3 * min(launched.ops.count("optimal_clip"), quantizers) + launched.ops.count("quantize_rows")
    return Beyond(forward, backward, (solves + kernels) / quantizers, quantizers)


def _steps(net: str, depth: int) -> Iterator[tuple[nn.Module, Tensor]]:
    """Return the net and a batch, of both sizes."""
    layer, batch_of, _ = NETS[net]
    for size in BATCHES:
        torch.manual_seed(0)
        yield nn.Sequential(*(layer() for _ in range(depth))), batch_of(size)


@functools.cache
def _of_float(net: str, depth: int) -> list[list[Generated]]:
    """Return the float steps, which are the same whatever is kept."""
    return [generated(model, batch, backend=None, autocast=True) for model, batch in _steps(net, depth)]


def main(rounds: int) -> None:
    """Count once (it does not vary), and write results/bytes.json."""
    rows: list[dict[str, Any]] = []
    for net, (keep, solve) in itertools.product(NETS, WAYS):
        if solve == "step" and NETS[net][2].activation_granularity == "token":
            # A clip for each token is found in the pass that rounds.
            continue
        found = beyond(net, DEPTH, keep=keep, solve=solve)
        rows.append(
            {
                "net": net,
                "kept": keep,
                "solve": solve,
                "forward": round(found.forward, 2),
                "backward": round(found.backward, 2),
                "sum": round(found.forward + found.backward, 2),
                "launches": round(found.launches, 2),
            }
        )
    result.write("bytes", {"rows": rows})
    print(tabulate(rows, headers="keys"))
