"""Small convolutional nets written from a grammar, as tests/support/fuzz.py writes programs.

Every variable of a forward is [B, 8, H, W]. For what is deployed: sums of paths, pools, concatenations, gates, norms,
writes in place.
"""

import random
from typing import Final

import torch
from torch import Tensor, nn

from tests.support.alike import run, tensors
from tests.support.fuzz import module_of

EXPRESSIONS: Final = (
    *("self.conv{k}({v})", "self.norm{b}(self.conv{k}({v}))", "F.relu(self.norm{b}(self.conv{k}({v})))"),
    *("F.relu6(self.conv{k}({v}))", "F.silu(self.norm{b}(self.conv{k}({v})))", "F.hardswish(self.conv{k}({v}))"),
    *("self.depthwise({v})", "F.relu(self.norm{b}(self.depthwise({v})))", "self.grouped({v})", "self.transposed({v})"),
    *("F.conv2d({v}, self.conv0.weight, self.conv0.bias, padding=1)", "self.prelu({v})", "F.group_norm({v}, 2)"),
    *("{v} + {w}", "F.relu({v} + {w})", "self.conv{k}({v} + {w})", "torch.add({v}, {w}, alpha=2)", "{v} - {w}"),
    *("{v} * {w}.sigmoid()", "{v} * self.conv{k}(F.adaptive_avg_pool2d({v}, 1)).sigmoid()", "torch.maximum({v}, {w})"),
    "{v} * F.hardsigmoid(self.conv{k}({v}.mean((2, 3), keepdim=True)))",
    *("self.narrow(torch.cat(({v}, {w}), 1))", "F.relu(self.narrow(torch.cat([{v}, self.conv{k}({w})], 1)))"),
    *("torch.cat([{v}[:, :4], {w}[:, 4:]], 1)", "torch.cat({v}.chunk(2, 1)[::-1], 1)", "F.max_pool2d({v}, 3, 1, 1)"),
    *("F.avg_pool2d({v}, 3, 1, 1)", "F.interpolate(F.max_pool2d({v}, 2), size={w}.shape[2:])"),
    "F.interpolate(F.avg_pool2d({v}, 2), size={w}.shape[2:], mode='bilinear')",
    *(
        "F.pad({v}, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]",
        "{v}.roll(1, 2)",
        "{v}.flip(3)",
        "F.dropout({v}, 0.3, self.training)",
    ),
    "self.fc({v}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)",
    "{v}.view({v}.shape[0], 2, 4, *{v}.shape[2:]).transpose(1, 2).reshape({v}.shape)",
    *("{v}.clamp(-1, 2)", "{v}.abs()", "{v} / 6", "{v} * 0.5 + 1", "F.gelu({v})"),
)
STATEMENTS: Final = (
    *("{n} = {e}",) * 10,
    *("{v} += {e}", "{v} = {v}.add_({w})", "{v} = F.relu({v}, inplace=True)", "{n} = {e}\n{v} = {v} + {n}"),
    *("{v} = {v}.clone(); {v}.add_({w})", "for _ in range(2):\n    {v} = F.relu(self.conv1({v})) + {v}"),
    *("{v}[:, :4].add_({w}[:, 4:])", "{v}.mul_(0.5)"),
)
RESULTS: Final = (
    *("self.fc(torch.flatten(F.adaptive_avg_pool2d({a}, 1), 1))", "self.fc({a}.mean((2, 3)))", "({a}, {b})"),
    *("(self.conv0({a}), dict(b={b}))", "self.fc(F.relu({a}).amax((2, 3)))"),
)


class Net(nn.Module):
    """What the programs speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.narrow, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Linear(8, 8)
        self.conv0, self.conv1 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.conv2, self.grouped = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.transposed = nn.ConvTranspose2d(8, 8, 3, padding=1)
        self.norm0, self.norm1, self.norm2, self.prelu = (*(nn.BatchNorm2d(8) for _ in range(3)), nn.PReLU(8))
        for norm in (self.norm0, self.norm1, self.norm2):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias, 0, 0.3)


def program(seed: int) -> str:
    """Write the body of a forward(self, x)."""
    drawn = random.Random(seed)
    names, lines = ["x", "y"], ["x = F.relu(self.stem(x))", "y = self.conv2(x)"]

    def expression(depth: int = 0) -> str:
        parts = {"v": drawn.choice(names), "w": drawn.choice(names)}
        if depth < 2 and drawn.random() < 0.35:
            parts["v"] = f"({expression(depth + 1)})"
        return drawn.choice(EXPRESSIONS).format(**parts, k=drawn.randint(0, 2), b=drawn.randint(0, 2))

    for at in range(drawn.randint(2, 7)):
        statement, new = drawn.choice(STATEMENTS), f"z{at}"
        lines += statement.format(v=drawn.choice(names), w=drawn.choice(names), n=new, e=expression()).splitlines()
        if "{n}" in statement:
            names.append(new)
    return "\n".join([*lines, f"return {drawn.choice(RESULTS).format(a=names[-1], b=drawn.choice(names))}"])


def built(source: str) -> nn.Module:
    return module_of("self, x", source, Net)


# Which sizes of the inputs are free, but for the number of images.
AXES: Final = {"x": [2, 3]}


def inputs() -> list[tuple[Tensor, ...]]:
    torch.manual_seed(2)
    return [(torch.randn(b, 3, h, w),) for b, h, w in ((2, 8, 8), (3, 10, 6), (1, 8, 8))]


def is_valid(source: str, training: bool = False) -> bool:
    """Tell whether float runs, and stays within what can be compared."""
    try:
        with torch.no_grad():
            found = [t for args in inputs() for t in tensors(run(built(source).train(training), args))]
    except Exception:
        return False
    return all(t.isfinite().all() and t.abs().max() < 1e4 for t in found)
