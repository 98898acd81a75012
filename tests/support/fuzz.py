"""Small models written from a grammar of Python and torch, and unlike inputs for them; see tests/support/faults.py.

Every variable of a forward is [B, T, 8], so that any statement can follow any other. A program that float itself
refuses, or whose numbers grow beyond comparing, is none.
"""

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support import elsewhere
from tests.support.alike import gradients, run, tensors

EXPRESSIONS = (
    *("self.{l}({v})", "F.linear({v}, self.{l}.weight)", "{v} @ self.{l}.weight", "self.{l}(self.{m}({v}).relu())"),
    *(
        "F.relu({v})",
        "torch.tanh({v})",
        "{v}.sigmoid()",
        "F.gelu({v})",
        "{v}.abs()",
        "F.softmax({v}, -1)",
        "{v}.exp().log1p()",
    ),
    *(
        "{v} + {w}",
        "{v} * {w}",
        "{v} - {w}.mean(1, keepdim=True)",
        "{v} / (1 + {w}.abs())",
        "-{v}",
        "{v} ** 2",
        "2 - {v}",
    ),
    *("torch.einsum('btd,de,ef->btf', {v}, self.{l}.weight, self.{m}.weight)", "torch.inner({v}, self.{l}.weight)"),
    *("torch.tensordot({v}, self.{l}.weight, 1)", "torch.einsum('btd,bsd,bse->bte', {v}, {w}, {v})"),
    *("F.scaled_dot_product_attention({v}, {w}, {w})", "({v} @ {w}.transpose(1, 2)).softmax(-1) @ {v}"),
    *(
        "{v}.reshape({v}.shape[0], -1, 8)",
        "{v}.view(len({v}), {v}.size(1), 2, 4).flatten(2)",
        "{v}.flip(1)",
        "{v}.mT.mT",
    ),
    *(
        "torch.cat(({v}[..., :4], {w}[..., 4:]), -1)",
        "torch.stack({v}.unbind(-1), -1)",
        "{v}.transpose(0, 1).transpose(0, 1)",
    ),
    *("torch.where({v} > 0, {v}, {w})", "{v}.masked_fill({w} > 1, 0.0)", "F.layer_norm({v}, (8,))", "self.norm({v})"),
    *(
        "{v} * {v}.shape[1]",
        "{v} + torch.arange({v}.shape[1])[:, None] / 10",
        "({v}.double() * 2).float()",
        "{v} * self.scale",
    ),
    *("elsewhere.pair({v})[0] * 2", "elsewhere.default(None, {v}) + 1", "({v} if type({v}) is Tensor else {w} * 3)"),
    *("sum(self.{l}({v}) * i for i in range(3))", "(lambda a, b=2: a * b)({v})", "dict(a={v}, b={w}).get('a') + {w}"),
    *("max([{v}, {w}], key=lambda t: t.dim())", "[self.{l}, self.{m}][1]({v})", "F.dropout({v}, 0.0, self.training)"),
    *(
        "self.conv({v}.transpose(1, 2)).transpose(1, 2)",
        "self.attention({v}, {w}, {v})[0]",
        "{v}.clone()",
        "{v}.detach() + {w}",
    ),
    *(
        "torch.stack([self.{l}(t) for t in {v}], 0)",
        "tripled({v})",
        "self.tripled({v})",
        "{v}.clamp(min=0)",
        "self.relu({v})",
    ),
    *("{v}.unsqueeze(1).expand(-1, 2, -1, -1).sum(1)", "{v}.cumsum(1)", "{v}.chunk(2, -1)[0].repeat(1, 1, 2)"),
)

STATEMENTS = (
    *("{n} = {e}",) * 8,
    *("{n} = {v}", "{v} += {e}", "{v} *= {f}", "{v} -= {e}", "{n} = {v}; {n} = {n} + 1", "{v} = {e}"),
    *("{v}[:, 0] = {w}[:, 0]", "{v}[..., 4:] *= torch.sigmoid({w}[..., 4:])", "{v}[{w} > 1] = 0", "{v}[..., 1] += 1"),
    *("{n} = {v}[..., :4]; {n} *= 0.5; {n} = {v}", "{v}.mul_(0.5)", "{v}.add_({w})", "{v}.relu_()", "{v}.sub_(1)"),
    *(
        "with torch.no_grad():\n    {n} = {e}",
        "with torch.no_grad():\n    {v} *= 0.5",
        "with torch.no_grad():\n    {v}.sub_(0.5)",
    ),
    *(
        "if {v}.shape[1] > 6:\n    {n} = {e}\nelse:\n    {n} = {f}",
        "if isinstance({v}, Tensor):\n    {n} = {e}\nelse:\n    {n} = 0",
    ),
    *(
        "for i in range(2):\n    {v} = {e}",
        "if self.training:\n    {v} = {e}",
        "for t in ({v}, {w}):\n    {v} = {v} + t",
    ),
    *(
        "self.{l}.weight.data *= self.mask",
        "with torch.no_grad():\n    self.{l}.weight *= self.mask",
        "assert {v}.dim() == 3",
    ),
    *("self.seen += 1", "self.mean.mul_(0.9).add_({v}.detach().mean((0, 1)), alpha=0.1)\n{n} = {e} + self.mean"),
    *("{n}, *_ = {v}.split(8, -1)", "torch._check({v}.shape[0] > 0)", "{n} = {e}\ndel {n}\n{n} = {f}"),
)


class Tripled(torch.autograd.Function):
    """A gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


class Fuzzed(nn.Module):
    """What the programs speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.conv, self.norm, self.relu = nn.Conv1d(8, 8, 3, padding=1), nn.LayerNorm(8), nn.ReLU(inplace=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale, self.tripled = nn.Parameter(torch.rand(8)), Tripled.apply
        self.register_buffer("mask", torch.ones(8, 8).tril())
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("seen", torch.tensor(0))


def program(seed: int) -> str:
    """Write the body of a forward(self, x, y)."""
    drawn = random.Random(seed)
    names, lines = ["x", "y"], []

    def expression(depth: int = 0) -> str:
        parts = {"v": drawn.choice(names), "w": drawn.choice(names)}
        if depth < 2 and drawn.random() < 0.3:
            parts["v"] = f"({expression(depth + 1)})"
        return drawn.choice(EXPRESSIONS).format(**parts, l=drawn.choice("abc"), m=drawn.choice("abc"))

    for at in range(drawn.randint(2, 7)):
        statement = drawn.choice(STATEMENTS)
        new = f"z{at}"
        lines += statement.format(
            v=drawn.choice(names), w=drawn.choice(names), n=new, l=drawn.choice("abc"), e=expression(), f=expression()
        ).splitlines()
        if "{n}" in statement:
            names.append(new)
    last = drawn.choice(["return {a}", "return {a}, {b}", "return dict(a={a}, b=[{b}])", "return self.c({a}) + {b}"])
    return "\n".join([*lines, last.format(a=names[-1], b=drawn.choice(names))])


def built(source: str) -> nn.Module:
    return module_of("self, x, y", source, Fuzzed, elsewhere=elsewhere, tripled=Tripled.apply)


def module_of(arguments: str, source: str, kind: type[nn.Module], **names: Any) -> nn.Module:
    """Make a module of a kind, with a forward of these arguments and this body, which may speak of names."""
    body = "\n".join(f"    {line}" for line in source.splitlines())
    scope = {"torch": torch, "F": F, "Tensor": Tensor, **names}
    exec(compile(f"def forward({arguments}):\n{body}", "<fuzz>", "exec"), scope)
    torch.manual_seed(0)
    made: nn.Module = type("Program", (kind,), {"forward": scope["forward"]})()
    return made


# Which sizes of the inputs are free, but for the first.
AXES = {"x": [1], "y": [1]}


def inputs() -> list[tuple[Tensor, ...]]:
    torch.manual_seed(2)
    return [tuple(torch.randn(b, t, 8) for _ in "xy") for b, t in ((2, 5), (3, 7), (1, 4))]


def is_valid(source: str, training: bool) -> bool:
    """Tell whether float runs, forward and backward, and stays within what can be compared."""
    try:
        for args in inputs():
            model = built(source).train(training)
            results = tensors(run(model, args))
            found = [*results, *gradients(model, results).values()]
            if not found or any(not t.isfinite().all() or t.abs().max() > 1e3 for t in found):
                return False
    except Exception:
        return False
    return True
