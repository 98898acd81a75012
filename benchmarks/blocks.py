"""What a training step costs of a transformer of twelve blocks, each compiled by itself: float beside octav.

Both are in one process and step in turn, on one thread; the minima of the time of that thread count.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from benchmarks import result

LAYERS, WIDTH, HEADS, BATCH, TOKENS = 12, 256, 4, 4, 128
WARM_UP, STEPS = 3, 10


class Conv1D(nn.Module):
    """The linear layer of GPT-2, with weights [in, out]."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        linear = nn.Linear(width, outputs)
        self.weight, self.bias = nn.Parameter(linear.weight.detach().t().contiguous()), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight + bias, [..., outputs], of x [..., width]."""
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


# The class of linear layers, and the arguments of compile().
VARIANTS: dict[str, tuple[Callable[[int, int], nn.Module], dict[str, Any]]] = {
    "float Inductor": (nn.Linear, {"backend": "inductor"}),
    "octav compiled": (nn.Linear, {"backend": "octav"}),
    "octav compiled, integer": (nn.Linear, {"backend": "octav", "options": {"integer": "auto"}}),
    "float Inductor, Conv1D": (Conv1D, {"backend": "inductor"}),
    "octav compiled, Conv1D": (Conv1D, {"backend": "octav"}),
}


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and beside what it changes."""

    def __init__(self, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to x [batch, tokens, WIDTH], and x."""
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads.unbind(0))
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return y


class Encoder(nn.Module):
    """Blocks, and a classifier over the mean of the tokens."""

    def __init__(self, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(linear) for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [batch, 1000] of x [batch, tokens, WIDTH]."""
        logits: Tensor = self.head(self.blocks(x).mean(1))
        return logits


def main(rounds: int) -> None:
    """Measure STEPS steps of each in every round, and write results/blocks.json."""
    torch.set_num_threads(1)
    steps = {name: training_step(prepared(name), *batch()) for name in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(WARM_UP + rounds * STEPS):
        for name, step in steps.items():
            start = time.thread_time()
            step()
            if index >= WARM_UP:
                times[name].append(1e3 * (time.thread_time() - start))
    least = {name: min(found) for name, found in times.items()}
    # The first variant of each class of linear layers is float.
    floats = {linear: least[name] for name, (linear, _) in reversed(VARIANTS.items())}
    rows = [
        {"variant": name, "ms": round(ms, 1), "ratio": round(ms / floats[VARIANTS[name][0]], 3)}
        for name, ms in least.items()
    ]
    setting = {"layers": LAYERS, "width": WIDTH, "batch": BATCH, "tokens": TOKENS, "threads": 1}
    result.write("blocks", {"setting": {**setting, "rounds": rounds, "steps": STEPS}, "rows": rows})
    print(tabulate(rows, headers="keys"))


def batch() -> tuple[Tensor, Tensor]:
    """Return tokens [BATCH, TOKENS, WIDTH] and targets [BATCH]."""
    torch.manual_seed(0)
    return torch.randn(BATCH, TOKENS, WIDTH), torch.randint(1000, (BATCH,))


def prepared(name: str) -> nn.Module:
    """Return the model of a variant, each block of which is compiled at its first call."""
    torch.manual_seed(0)
    linear, arguments = VARIANTS[name]
    model: nn.Module = Encoder(linear)
    if name.startswith("octav"):
        model = octav_fx.quantize(model, batch()[0], blocks=[Block])
    for block in model.modules():
        if isinstance(block, Block):
            block.compile(**arguments)
    return model


def training_step(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
    """Return zero_grad, forward, backward and SGD as a function."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    return step
