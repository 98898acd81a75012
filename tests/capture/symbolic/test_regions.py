"""regions: no_grad and autocast in forward mean in the graph what they mean in Python."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx.capture.rerun import without_quantizers
from octav_fx.capture.whole import WholeModule
from octav_fx.errors import OctavError
from octav_fx.ir.printer import graph_text
from tests.support.alike import quantized_alike
from tests.support.graphs import captured, model, parameter, run_alike


def nodes(gm: Any, *names: str) -> list[str]:
    found = [str(getattr(node.target, "__name__", node.target)) for node in gm.graph.nodes]
    return [name for name in found if name in names]


def parts() -> dict[str, Any]:
    return {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "w": parameter(4)}


# torch.no_grad: forward functions of x, and the parameters that get a gradient.


def cut(s: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = s.a(x).relu()
    return s.b(y)


def cut_parameter(s: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = s.w.abs().mean()
    return s.a(x) * scale


def nested(s: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        with torch.enable_grad():
            y = s.a(x)
        z = s.b(x)
    return y + z


def inference(s: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.set_grad_enabled(False):
        y = s.a(x)
    return s.b(x) + y


@torch.no_grad()
def decorated(s: nn.Module, x: Tensor) -> Tensor:
    return s.a(x)


def partly(s: nn.Module, x: Tensor) -> Tensor:
    return decorated(s, x) + s.b(x)


def integers(s: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        best = s.a(x).argmax(-1)
    return F.one_hot(best, 4) * s.b(x)


def pairs(s: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        values, indices = s.a(x).max(-1, keepdim=True)
    return s.b(x) * values + indices


CUTS: dict[str, tuple[Callable[..., Tensor], set[str]]] = {
    "a value": (cut, {"b.weight", "b.bias"}),
    "a value of a parameter": (cut_parameter, {"a.weight", "a.bias"}),
    "enable_grad inside": (nested, {"a.weight", "a.bias"}),
    "set_grad_enabled": (inference, {"b.weight", "b.bias"}),
    "a decorator": (partly, {"b.weight", "b.bias"}),
    "integers": (integers, {"b.weight", "b.bias"}),
    "a pair": (pairs, {"b.weight", "b.bias"}),
}


@pytest.mark.parametrize("name", CUTS)
def test_gradients_are_cut_where_forward_cuts_them(name: str) -> None:
    forward, learned = CUTS[name]
    float_module, x = model(forward, **parts()), torch.randn(3, 4)
    gm = captured(float_module, x=x)
    assert run_alike(gm, float_module, x=torch.randn(5, 4))
    names, parameters = zip(*float_module.named_parameters(), strict=True)
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), parameters, allow_unused=True) for f in (gm, float_module))
    assert {name for name, g in zip(names, theirs, strict=True) if g is not None} == learned
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other)), name


@pytest.mark.parametrize("name", CUTS)
def test_quantized_it_learns_what_the_float_model_learns(name: str) -> None:
    forward, learned = CUTS[name]
    x = torch.randn(3, 4)
    q = octav_fx.quantize(model(forward, **parts()), x)
    assert isinstance(q, WholeModule)
    q(x).square().sum().backward()
    assert {name for name, p in q.named_parameters() if p.grad is not None} == learned


def test_golden() -> None:
    gm = captured(model(cut, **parts()), x=torch.randn(3, 4))
    assert graph_text(gm.graph) == (
        "a = self.a(x)\ndetach = a.detach()\nrelu = detach.relu()\nb = self.b(relu)\nreturn b"
    )


def test_what_gets_no_gradient_anyway_is_not_cut() -> None:
    def forward(self, x, i):
        with torch.no_grad():
            positions = torch.arange(4.0) + i * 2.0
        return self.a(x) + positions

    assert nodes(captured(model(forward, **parts()), x=torch.randn(3, 4), i=torch.tensor(1)), "detach") == []


def test_a_trace_under_no_grad_is_that_of_a_trace_with_gradients() -> None:
    float_module, x = model(lambda s, x: s.b(s.a(x)), **parts()), torch.randn(3, 4)
    with torch.no_grad():
        gm = captured(float_module, x=x)
        assert not torch.is_grad_enabled()
    assert nodes(gm, "detach") == []
    assert gm(x).requires_grad


class Tripled(torch.autograd.Function):
    """relu with a gradient of its own, three times the right one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (ctx.saved_tensors[0] > 0) * 3


class Scaled(torch.autograd.Function):
    """Two results, and a backward of its own in the newer style."""

    @staticmethod
    def forward(x: Tensor, scale: float = 2.0) -> tuple[Tensor, Tensor]:
        return x * scale, x + 1

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> Any:
        return first * ctx.scale * 5 + second, None


tripled = Tripled.apply
OTHER_NAMES: dict[str, Callable[..., Any]] = {
    "a global": lambda s, x: tripled(s.a(x)),
    "an attribute": lambda s, x: s.act(s.a(x)),
    "an item": lambda s, x: s.acts["relu"](s.a(x)),
    "a partial": lambda s, x: functools.partial(tripled)(s.a(x)),
    "of a parameter": lambda s, x: F.linear(x, tripled(s.w.expand(4, 4))),
    "two results": lambda s, x: sum(Scaled.apply(s.a(x))),
    "by its class": lambda s, x: Tripled.apply(s.a(x)),
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_function_keeps_its_gradient_by_whatever_name_it_is_called(name: str) -> None:
    float_model = model(OTHER_NAMES[name], act=Tripled.apply, acts={"relu": Tripled.apply}, **parts())
    quantized_alike(float_model, (torch.randn(3, 4),), (torch.randn(5, 4),))


def test_statistics_that_forward_keeps_under_no_grad_are_kept() -> None:
    def forward(self, x):
        with torch.no_grad():
            self.mean.mul_(0.5).add_(x.mean(0), alpha=0.5)
        return self.a(x - self.mean)

    x = torch.randn(3, 4)
    one, other = (model(forward, **parts(), mean=torch.zeros(4)) for _ in range(2))
    other.load_state_dict(one.state_dict())
    gm = captured(one, x=x)
    for values in (x, x + 1):
        assert torch.equal(gm(values), other(values))
    assert torch.equal(one.mean, other.mean) and one.mean.abs().sum() > 0


# torch.autocast.


def guarded(s: nn.Module, x: Tensor) -> Tensor:
    y = s.a(x)
    with torch.autocast(x.device.type, enabled=False):
        y = s.b(y.float()) * s.w
    return s.a(y)


def lowered(s: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = s.a(x)
    return s.b(y.float())


def in_turn(s: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = s.a(x)
        with torch.autocast("cpu", enabled=False):
            z = s.b(x)
        return y + z @ z.t() @ y


@torch.autocast("cpu", enabled=False)
def under_a_decorator(s: nn.Module, x: Tensor) -> Tensor:
    return s.b(x.float())


REGIONS = {
    "disabled inside": guarded,
    "enabled inside": lowered,
    "one in the other": in_turn,
    "a decorator": lambda s, x: under_a_decorator(s, s.a(x)),
}
OUTER = {
    "alone": lambda: torch.autocast("cpu", enabled=False),
    "under bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("name", REGIONS)
def test_regions_hold_inside_of_a_region_outside(name: str, outer: str) -> None:
    float_module, x = model(REGIONS[name], **parts()), torch.randn(4, 4)
    q = octav_fx.quantize(float_module, x)
    assert isinstance(q, WholeModule)
    with OUTER[outer]():
        expected = float_module(x)
        with octav_fx.float_mode(q):
            assert alike(q(x), expected)
        with without_quantizers(q):
            assert alike(q(x), expected)
        assert q(x).dtype is expected.dtype
        assert torch.is_autocast_enabled("cpu") == (outer != "alone")


def alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(one, other)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "eager") for name in REGIONS), ("disabled inside", "octav"), ("one in the other", "octav")],
)
def test_regions_hold_in_what_is_compiled(name: str, backend: str) -> None:
    torch._dynamo.reset()
    float_module, x = model(REGIONS[name], **parts()), torch.randn(4, 4)
    q = octav_fx.quantize(float_module, x)
    compiled = torch.compile(q, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        expected = q(x)
        found = compiled(x)
    assert found.dtype is expected.dtype
    if backend == "eager":
        assert torch.equal(found, expected)
    else:
        # A product in bfloat16 that rounds the other way moves values by one of the steps of a grid of four bits.
        torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=float(expected.abs().max()) / 4)


def test_golden_of_a_region() -> None:
    gm = captured(model(in_turn, **parts()), x=torch.randn(4, 4))
    # A region that says nothing of it has what the process has, whatever ran before.
    cached = torch.is_autocast_cache_enabled()
    assert graph_text(gm.graph) == (
        f"_enter_autocast = _enter_autocast('cpu', torch.bfloat16, True, {cached})\n"
        "a = self.a(x)\n"
        f"_enter_autocast_1 = _enter_autocast('cpu', torch.bfloat16, False, {cached})\n"
        "b = self.b(x)\n"
        "_exit_autocast = _exit_autocast(_enter_autocast_1)\n"
        "t = b.t()\n"
        "matmul = matmul(b, t)\n"
        "matmul_1 = matmul(matmul, a)\n"
        "add = add(a, matmul_1)\n"
        "_exit_autocast_1 = _exit_autocast(_enter_autocast)\n"
        "return add"
    )


def test_the_device_that_a_region_asks_for_is_checked() -> None:
    gm = captured(model(guarded, **parts()), x=torch.randn(3, 4))
    assert nodes(gm, "_enter_autocast", "_exit_autocast") == ["_enter_autocast", "_exit_autocast"]
    sizes = gm.graphs_of(False)[0].guards.sizes
    assert graph_text(sizes.graph).splitlines()[0] == "getattr_1 = getattr(x, 'device')" and sizes.expected == ("cpu",)


@pytest.mark.parametrize("fails", [False, True])
def test_torchs_own_regions_are_back_after_a_capture(fails: bool) -> None:
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            if fails:
                raise ValueError("as asked")
            return self.a(x)

    before = torch.autocast.__enter__, torch.autocast.__exit__
    if fails:
        with pytest.raises(OctavError, match="as asked"):
            captured(model(forward, **parts()), x=torch.randn(3, 4))
    else:
        captured(model(forward, **parts()), x=torch.randn(3, 4))
    assert (torch.autocast.__enter__, torch.autocast.__exit__) == before
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_gradients_through_a_region_are_those_of_the_float_model() -> None:
    float_module, x = model(guarded, **parts()), torch.randn(4, 4)
    gm = captured(float_module, x=x)
    parameters = list(float_module.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (f(x).float().square().sum() for f in (gm, float_module))
    for one, other in zip(*(torch.autograd.grad(loss, parameters) for loss in (ours, theirs)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_a_decorator_with_keywords_keeps_the_signature() -> None:
    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return function(self, *args, **kwargs)

        return wrapped

    @logged
    def forward(self, x, scale=None, *, shift=0.0, **others):
        y = self.a(x) + shift
        y = y if scale is None else y * scale
        return y + others["extra"] if "extra" in others else y

    float_module, x = model(forward, **parts()), torch.randn(3, 4)
    for kwargs in ({}, {"scale": x}, {"shift": 1.0}, {"extra": x}, {"scale": x, "extra": x}):
        q = octav_fx.quantize(float_module, {"x": x, **kwargs})
        assert isinstance(q, WholeModule)
        with octav_fx.float_mode(q):
            assert torch.equal(q(x, **kwargs), float_module(x, **kwargs))
        with without_quantizers(q):
            assert torch.equal(q(x=x, **kwargs), float_module(x, **kwargs))
        with octav_fx.float_mode(q):
            assert torch.equal(q(x, **kwargs, unknown=x), float_module(x, **kwargs, unknown=x))
        q(x, **kwargs, unknown=x)
        with without_quantizers(q):
            assert torch.equal(q(x, **kwargs, unknown=x), float_module(x, **kwargs, unknown=x))


class Doubled(torch.autograd.Function):
    """Its gradient is not that of what it computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


@pytest.mark.slow
def test_a_function_with_a_gradient_of_its_own_keeps_it() -> None:
    float_module, x = (
        model(lambda s, x: s.b(Doubled.apply(s.a(x), 5.0)), a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        torch.randn(3, 4),
    )
    q = octav_fx.quantize(float_module, x)
    assert isinstance(q, WholeModule) and "apply_function" in q.code
    torch.compiler.reset()
    results = []
    for module in (q, torch.compile(q, backend="eager"), copy.deepcopy(q)):
        q.zero_grad()
        twin = module if isinstance(module, WholeModule) else q
        module(x).sum().backward()
        results.append(twin.a.weight.grad.clone())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    # Five times the gradient that comes in, quantizers in front of b or not.
    with octav_fx.float_mode(q):
        q.zero_grad()
        q(x).sum().backward()
    incoming = (torch.ones(len(x), 4) @ float_module.b.weight) * 5
    # Two products of four and three numbers near one, in float32.
    torch.testing.assert_close(q.a.weight.grad, incoming.T @ x, rtol=1e-5, atol=1e-6)
    # Afterwards functions are applied as ever.
    assert Doubled.apply(torch.ones(2, requires_grad=True), 3.0).grad_fn is not None


@pytest.mark.parametrize("function", [lambda y: y.chunk(2), lambda y: y.max(-1, keepdim=True), lambda y: (y, [y])])
def test_no_grad_holds_for_results_that_are_unpacked_outside(function: Callable[[Tensor], Any]) -> None:
    def forward(self, x):
        with torch.no_grad():
            found = function(self.a(x))
        return self.b(found[0].expand(-1, 4))

    q = octav_fx.quantize(model(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), torch.randn(6, 4))
    q(torch.randn(6, 4)).sum().backward()
    assert q.a.weight.grad is None and q.b.weight.grad is not None
