"""Small models written from a grammar of Python and torch, quantized and compared with float on unlike inputs.

    python -m tests.support.fuzz --minutes 10 [--seed 0]

Every variable of a forward is [B, T, 8], so that any statement can follow any other. A program that float itself
refuses, or whose numbers grow beyond comparing, is none. What a graph says it does not hold for is no finding.
"""

import argparse
import contextlib
import io
import random
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx.errors import OctavError
from octav_fx.nn import FakeQuantizer
from tests.support import elsewhere
from tests.support.alike import assert_computes, gradients, run, tensors

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
    body = "\n".join(f"    {line}" for line in source.splitlines())
    scope = {"torch": torch, "F": F, "Tensor": Tensor, "elsewhere": elsewhere, "tripled": Tripled.apply}
    exec(compile(f"def forward(self, x, y):\n{body}", "<fuzz>", "exec"), scope)
    torch.manual_seed(0)
    return type("Program", (Fuzzed,), {"forward": scope["forward"]})()


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


def check_signs(q: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Check that nothing negative reaches an unsigned grid."""

    def seen(quantizer: nn.Module, given: tuple[Tensor], result: Tensor) -> None:
        assert isinstance(quantizer, FakeQuantizer)
        assert quantizer.spec.format.signed or given[0].min() >= 0, "a negative value on an unsigned grid"

    handles = [m.register_forward_hook(seen) for m in q.modules() if isinstance(m, FakeQuantizer)]
    run(q, args)
    for handle in handles:
        handle.remove()


def fault(source: str, training: bool) -> str | None:
    """Say what is wrong with the quantized program, or return None."""
    if not is_valid(source, training):
        return None
    model, all_inputs = built(source).train(training), inputs()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            q = octav_fx.quantize(model, all_inputs[0])
    except OctavError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    for args in all_inputs:
        try:
            # fx prints where in its generated code an error came up.
            with contextlib.redirect_stderr(io.StringIO()):
                assert_computes(q, built(source).train(training), args)
                check_signs(q, args)
        except OctavError:
            continue
        except AssertionError as error:
            return f"differs: {error}"
        except RuntimeError as error:
            # A quantizer keeps its input for the mask of its gradient, where a product of float would not.
            if "modified by an inplace operation" not in str(error):
                return f"raised later: {error}"
        except Exception as error:
            return f"raised later {type(error).__name__}: {error}"
    return None


def main() -> None:
    """Write and check programs until the time is up; print each finding once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    end, seed, valid = time.monotonic() + 60 * given.minutes, given.seed, 0
    while time.monotonic() < end:
        source, training = program(seed), bool(seed % 2)
        found = fault(source, training)
        valid += is_valid(source, training)
        if found is not None:
            print(f"--- seed {seed}: {found}\n{source}\n", flush=True)
        seed += 1
    print(f"{seed - given.seed} programs, {valid} of them valid", flush=True)


if __name__ == "__main__":
    main()
