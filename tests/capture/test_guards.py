"""Guards of arguments: what Python may have asked of them is asked again in each call."""

import copy
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx.capture.modules import graphs_of
from tests.support.alike import assert_close, silent_quantizers
from tests.support.graphs import model

x = torch.randn(2, 5, 8)


class Marked(Tensor):
    """A class of the user's."""


class AsksForItsClass(nn.Module):
    def __init__(self, kind: type[Tensor]) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(8, 8), kind

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        y = self.layer(x)
        return y * factor if isinstance(factor, self.kind) else y + factor


@pytest.mark.slow
@pytest.mark.parametrize("made", [nn.Parameter, lambda t: t.as_subclass(Marked)])
@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_class_of_a_tensor_is_guarded(made: type, is_first: bool, is_compiled: bool) -> None:
    plain, special = torch.full((8,), 2.0), made(torch.full((8,), 2.0))
    model = AsksForItsClass(type(special)).eval()
    calls = [special, plain, special] if is_first else [plain, special, plain]
    q = octav_fx.quantize(model, (x, calls[0]))
    torch.compiler.reset()
    call = torch.compile(q, backend="eager") if is_compiled else q
    for factor in calls:
        with silent_quantizers():
            assert_close("a call", call(x, factor).as_subclass(Tensor), model(x, factor).as_subclass(Tensor))
    # What is of a class of the user's is followed by the module's own Python.
    graphs = graphs_of(q)
    assert not isinstance(special, nn.Parameter) or (graphs is not None and len(graphs.graphs_of(False)) == 2)


NUMBER = 0.0


class AsksForASign(nn.Module):
    """Goes other ways for numbers that are equal, and the same way for one that is not equal to itself."""

    def __init__(self, held: float = 1.0) -> None:
        super().__init__()
        self.layer, self.held = nn.Linear(8, 8), held

    def forward(self, x: Tensor, given: float = 1.0) -> Tensor:
        y = self.layer(x)
        for number in (given, self.held, NUMBER):
            y = y * 3.0 if math.isnan(number) else y * math.copysign(1.0, number)
        return y


@pytest.mark.slow
@pytest.mark.parametrize("place", ["argument", "attribute", "global"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_zeros_of_both_signs_and_nan_are_told_apart(
    place: str, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AsksForASign(0.0).eval()
    q = octav_fx.quantize(model, (x, 0.0))
    torch.compiler.reset()
    call = torch.compile(q, backend="eager") if is_compiled else q
    # More often than there may be graphs.
    # A compiler's own guards take -0.0 for 0.0, in float models too.
    numbers = [1.0] if is_compiled else [-0.0]
    for number in (0.0, *numbers, *[float("nan") for _ in range(10)], 0.0):
        args = (x, number) if place == "argument" else (x, 0.0)
        if place == "attribute":
            model.held = q.held = number
        if place == "global":
            monkeypatch.setattr(sys.modules[__name__], "NUMBER", number)
        with silent_quantizers():
            assert_close(f"{number}", call(*args), model(*args))
    assert len(graphs_of(q).graphs_of(False)) == 3


class Memory:
    """A cache of keys."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None

    def update(self, keys: Tensor) -> Tensor:
        self.kept = keys if self.kept is None else torch.cat([self.kept, keys], 1)
        return self.kept


class AsksForTheDtypeOfWhatItKeeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        keys = memory.update(self.first(x))
        scores = keys.amax(1, keepdim=True)
        return self.second(x) + (scores if keys.dtype == torch.float32 else scores.float() * 2)


@pytest.mark.slow
def test_dtypes_of_what_is_computed_behind_a_cache_are_asked_before_it_is_written() -> None:
    model = AsksForTheDtypeOfWhatItKeeps().eval()
    q = octav_fx.quantize(model, (x, Memory()))
    for enabled in (True, False, True):
        of_float, of_q = Memory(), Memory()
        with silent_quantizers(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for step in (x, x[:, :1], x[:, 1:3]):
                assert_close(f"autocast {enabled}", q(step, of_q), model(step, of_float))
                assert of_q.kept is not None and of_float.kept is not None
                assert_close("kept", of_q.kept, of_float.kept)
    # One for each pair of what the memory holds and autocast.
    assert len(graphs_of(q).graphs_of(False)) == 4


class BranchesOnSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) if x.shape[1] > 3 and x.shape[0] != 7 else x
        # Of a size that is computed the graph asks as it runs.
        z = y[:, y[0, :, 0].cumsum(0).shape[0] // 2 :]
        return z * 2 if z.shape[1] > 1 else z


@pytest.mark.compile
def test_a_compiler_decides_a_branch_on_a_size_for_all_sizes() -> None:
    q = octav_fx.quantize(BranchesOnSizes().eval(), x)
    seen: list[torch.fx.GraphModule] = []

    def counted(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.append(gm)
        return gm

    torch.compiler.reset()
    compiled = torch.compile(q, backend=counted, fullgraph=True)
    with torch.no_grad():
        for length in (5, 6, 9, 5):
            given = torch.randn(2, length, 8)
            assert torch.equal(compiled(given), q(given))
    # The first size, and all others.
    assert len(seen) == 2


@pytest.mark.slow
def test_compiled_a_fact_that_fails_ends_what_is_asked_of_a_size(fresh_dynamo):
    """A table of one size is resampled for another one: what the graph of the first computes there does not run."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        table = self.table
        if tokens.shape[1] != table.shape[1]:
            table = F.interpolate(table.transpose(1, 2), size=tokens.shape[1]).transpose(1, 2)
        first, second = (tokens + table).chunk(2, -1)
        return self.head(first * second)

    layers = {"embed": nn.Conv2d(3, 8, 4, 4), "table": nn.Parameter(torch.randn(1, 4, 8)), "head": nn.Linear(4, 2)}
    small, large = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 16, 12)
    q = octav_fx.quantize(model(forward, **layers), small)
    compiled, eager = torch.compile(copy.deepcopy(q), backend="eager"), q
    for x in (small, large, small, large):
        assert torch.equal(compiled(x), eager(x))


@pytest.mark.slow
@pytest.mark.parametrize("norm", [F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm])
def test_compiled_what_is_asked_of_a_size_moves_no_statistics(fresh_dynamo, norm):
    def forward(self, x: Tensor) -> Tensor:
        mean, var, is_torchs = self.mean, self.var, norm in (torch.batch_norm, torch.instance_norm)
        tensors, more = ((None, None, mean, var), (False,)) if is_torchs else ((mean, var, None, None), ())
        y = norm(self.embed(x), *tensors, True, 0.1, 1e-5, *more)
        first, second = y.flatten(2).transpose(1, 2).unflatten(-1, (4, 2)).unbind(-1)
        return self.head(first * second)

    layers = {"embed": nn.Conv2d(3, 8, 4, 4), "mean": torch.zeros(8), "var": torch.ones(8), "head": nn.Linear(4, 2)}
    images = torch.randn(2, 3, 8, 8)
    q = octav_fx.quantize(model(forward, **layers), images)
    (graph,) = graphs_of(q).graphs_of(True)
    assert graph.guards.deep is not None
    compiled, eager = torch.compile(copy.deepcopy(q), backend="eager"), q
    for _ in range(2):
        assert torch.equal(compiled(images), eager(images))
    assert torch.equal(compiled.mean, eager.mean) and torch.equal(compiled.var, eager.var)
    assert eager.mean.abs().sum() > 0


@torch.library.custom_op("tests::counted", mutates_args=("calls",))
def counted(x: Tensor, calls: Tensor) -> Tensor:
    """Double x, and count."""
    calls.add_(1)
    return x * 2


@counted.register_fake
def _(x: Tensor, calls: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.slow
def test_compiled_what_is_asked_of_a_size_runs_no_op_that_writes(fresh_dynamo):
    def forward(self, x: Tensor) -> Tensor:
        first, second = counted(self.fc(x), self.calls).unflatten(-1, (4, 2)).unbind(-1)
        return first * second

    q = octav_fx.quantize(model(forward, fc=nn.Linear(8, 8), calls=torch.zeros(())), x)
    compiled, eager = torch.compile(copy.deepcopy(q), backend="eager"), q
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(x), eager(x))
    assert compiled.calls == eager.calls == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "drawn",
    [
        lambda y: torch.randn(3, y.shape[-1]),
        lambda y: torch.rand_like(y),
        lambda y: y + torch.randint(0, 9, (y.shape[-1],)),
        lambda y: y[(torch.rand(3) * 3).long()],
        lambda y: y[torch.randperm(y.shape[0])],
        lambda y: torch.bernoulli(y.sigmoid()),
        lambda y: y.sigmoid().bernoulli(),
        lambda y: F.dropout(y, 0.5, True),
    ],
    ids=["randn", "rand_like", "randint", "index", "randperm", "bernoulli", "method", "dropout"],
)
def test_guards_draw_no_random_numbers(drawn: Any) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = torch.cat([x, drawn(s.a(x))])
        # What forward computes decides.
        return s.b(y * 2 if y.shape[0] * y.shape[1] > 5 else y)  # type: ignore[no-any-return]

    q = octav_fx.quantize(model(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), torch.randn(3, 4))
    compiled = torch.compile(copy.deepcopy(q), backend="eager")
    for x in (torch.randn(3, 4), torch.randn(5, 4)):
        torch.manual_seed(1)
        expected = q(x), torch.rand(1)
        torch.manual_seed(1)
        assert torch.equal(compiled(x), expected[0]) and torch.equal(torch.rand(1), expected[1])
