"""A frozen model computes the definition of its integers in eval mode, whatever has happened to its state."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import convert_frame

from octav_fx import Config, OctavError, calibrate, convert, freeze, quantize, unfreeze
from octav_fx.capture.integer_module import IntegerModule
from octav_fx.nn import FakeQuantizer, IntegerWeight
from tests.support.deployable_models import LANGUAGE, WHOLE, frozen, relative, shortened
from tests.support.nets import ConvNet as Net

# The first three have nothing but integers between input and result.
NETS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "encoder", "gpt")
# Widths of codes and kinds of layers err apart: every net has codes of 8 bits, and the other widths are those of plain
# convolutions, of depthwise ones and of text.
FEWER_BITS = [
    *(("resnet18", (4, 8)), ("mobilenet_v2", (4, 4)), ("encoder", (4, 8))),
    *(("efficientnet_b0", (4, 8)), ("resnet18", (4, 4)), ("gpt", (4, 4))),
]


def ready(model: nn.Module | None = None, config: Config | None = None) -> tuple[nn.Module, Tensor]:
    x = torch.randn(2, 3, 8, 8)
    return freeze(calibrate(quantize((model or Net()).eval(), x, config), [x])), x


@torch.no_grad()
def defined(q: nn.Module, *inputs: Tensor) -> Tensor:
    return convert(q, integers=False)(*inputs)


def computes_the_rule(q: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(q(x), defined(q, x)) and not torch.equal(q(x), q.simulated_forward(x))


@pytest.mark.parametrize("shared", ["token", "group-4"])
def test_beside_a_clip_for_each_row_of_data(shared):
    config = Config(
        8, 8, edge_bits=None, activation_granularity=shared, overrides={"2": {"activation_granularity": "tensor"}}
    )
    model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 12)), torch.randn(32, 8)
    q = freeze(calibrate(quantize(model, x, config), [x])).eval()
    # The second layer has integers and a bias on the grid of their sums.
    assert computes_the_rule(q, x)
    # Without static clips the graph is all there is.
    assert torch.equal(unfreeze(q)(x), q.simulated_forward(x))


class TwoForwards(nn.Module):
    """A layer that chooses its forward when it is made, as timm's do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.forward = self.forward_plain

    def forward_plain(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_around_forwards_that_modules_chose_themselves():
    # The embedding stays float, and the graph calls it as it is.
    layers = nn.Embedding(5, 8), TwoForwards(nn.Linear(8, 16)), nn.GELU(), nn.Linear(16, 12)
    own = layers[0].forward
    layers[0].forward = lambda x: own(x)
    x = torch.randint(5, (32,))
    q = freeze(calibrate(quantize(nn.Sequential(*layers), x, Config(8, 8)), [x])).eval()
    assert computes_the_rule(q, x)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), [*((name, (8, 8)) for name in NETS), *FEWER_BITS])
def test_256_inputs_bit_for_bit(name, bits):
    q, _ = frozen(WHOLE[name], Config(*bits))
    c = convert(q, integers=False)
    with torch.no_grad():
        for _ in range(4):
            inputs = WHOLE[name].inputs(64)
            assert torch.equal(q(*inputs), c(*inputs))


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["octav", "inductor"])
@pytest.mark.parametrize("name", ["resnet18", "encoder", "gpt"])
def test_compiled_bit_for_bit(name, backend):
    q, inputs = frozen(shortened()[name], Config(8, 8))
    with torch.no_grad():
        found = torch.compile(q, backend=backend, fullgraph=True)(*inputs)
        assert torch.equal(found, torch.compile(convert(q, integers=False), backend=backend)(*inputs))
        # GELU, layer norm and softmax are rounded otherwise in compiled code, which moves codes.
        assert torch.equal(found, q(*inputs)) or (name in LANGUAGE and relative(found, q(*inputs)) < 0.02)


def test_with_gradients_the_bits_are_the_same_and_the_gradients_are_those_of_the_graph():
    q, x = ready()
    x.requires_grad_()
    y = q(x)
    assert torch.equal(y, defined(q, x))
    y.square().sum().backward()
    of_x, of_weight = x.grad.clone(), q.conv.weight.grad.clone()
    q.zero_grad()
    x.grad = None
    simulated = q.simulated_forward(x)
    simulated.backward(2 * y.detach())
    assert torch.equal(x.grad, of_x)
    assert torch.equal(q.conv.weight.grad, of_weight)
    assert of_weight.any()


def test_it_is_no_part_of_the_module():
    q, x = ready()
    before = list(q.state_dict()), [name for name, _ in q.named_modules()], list(q.parameters())
    with torch.no_grad():
        q(x)
    assert before[:2] == (list(q.state_dict()), [name for name, _ in q.named_modules()])
    assert all(first is second for first, second in zip(before[2], q.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in q.parameters())


def test_what_stays_float_is_shared():
    model = nn.Sequential(nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 2)).eval()
    x = torch.randint(6, (3, 5))
    q = freeze(calibrate(quantize(model, x), [x]))
    q.refresh()
    rule = q.graphs_of(False)[0].derived.module
    assert isinstance(rule, IntegerModule)
    assert rule.get_submodule("1").weight is q.get_parameter("1.weight")
    assert [m for m in rule.modules() if isinstance(m, IntegerWeight)]
    assert not [m for m in rule.modules() if isinstance(m, FakeQuantizer)]


class Called(nn.Module):
    """Takes another branch with a mask, and writes into a cache that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: dict[str, Tensor] | None = None) -> Tensor:
        y = self.first(x).relu()
        if cache is not None:
            cache["y"] = y = torch.cat([cache["y"], y]) if "y" in cache else y
        return self.last(y if mask is None else y * mask - 1)


@pytest.mark.slow
def test_every_kind_of_call():
    x, mask = torch.randn(4, 8), torch.rand(4, 8)
    q = quantize(Called().eval(), x)
    calls = [(x,), (x, mask), (x, None, {"y": x.abs()})]
    freeze(calibrate(q, copy.deepcopy(calls)))
    rules = [guarded.derived.module for guarded in q.graphs_of(False)]
    assert len(rules) == len(calls)
    # Once for all of them.
    codes = [name for name, _ in rules[0].named_buffers() if name.endswith("_weight.codes")]
    assert codes and all(rule.get_buffer(name) is rules[0].get_buffer(name) for rule in rules for name in codes)
    for change in (lambda q: None, _scale):
        change(q)
        converted = convert(q, integers=False)
        for call in calls:
            own, its, simulated = (copy.deepcopy(call) for _ in range(3))
            with torch.no_grad():
                y = q(*own)
                assert torch.equal(y, converted(*its)) and not torch.equal(y, q.simulated_forward(*simulated))
            if len(call) == 3:
                assert torch.equal(own[2]["y"], its[2]["y"]) and len(its[2]["y"]) == 2 * len(x)


@pytest.mark.slow
def test_training_mode_and_unfreezing_are_as_before():
    q, x = ready()
    q.train()
    q.norm.eval()
    assert torch.equal(q(x), q.simulated_forward(x))
    q.eval()
    assert computes_the_rule(q, x)
    unfreeze(q)
    assert torch.equal(q(x), q.simulated_forward(x))
    held = weakref.ref(q)
    del q
    gc.collect()
    assert held() is None


def _write(q: nn.Module) -> None:
    with torch.no_grad():
        q.fc.weight.mul_(-0.5)


def _scale(q: nn.Module) -> None:
    with torch.no_grad():
        q.last.weight.mul_(-0.5)


def _replace(q: nn.Module) -> None:
    q.fc.weight = nn.Parameter(-0.5 * q.fc.weight.detach())


def _swap(q: nn.Module) -> None:
    q.fc.weight.data = -0.5 * q.fc.weight.data


def _load(q: nn.Module) -> None:
    q.load_state_dict(ready()[0].state_dict())


def _step(q: nn.Module) -> None:
    q.train()
    with torch.enable_grad():
        q(torch.randn(4, 3, 8, 8)).square().sum().backward()
    torch.optim.SGD(q.parameters(), 0.1).step()
    q.eval()


def _clip(q: nn.Module) -> None:
    q.quantizers.conv_input.clip.mul_(0.5)


@pytest.mark.parametrize("change", [_write, _replace, _swap, _load, _step, _clip])
def test_a_change_of_the_state_is_seen(change):
    q, x = ready()
    with torch.no_grad():
        first = q(x)
    change(q)
    assert computes_the_rule(q, x)
    with torch.no_grad():
        assert not torch.equal(q(x), first)
        again = q.graphs_of(False)[0].derived
        q(x)
        # And nothing is made twice.
        assert q.graphs_of(False)[0].derived is again


def test_an_edited_graph_computes_what_it_says():
    q, x = ready()
    with torch.no_grad():
        first = q(x)
        (result,) = q.graph.find_nodes(op="output")
        with q.graph.inserting_before(result):
            doubled = q.graph.call_function(torch.mul, (result.args[0], 2))
        result.args = (doubled,)
        q.recompile()
        assert torch.equal(q(x), 2 * first)


class Begun(nn.Flatten):
    """Begins anew in a copy, in training mode, as layers of einops do; the graph calls its function."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def __getstate__(self) -> dict[str, int]:
        return {"start": self.start_dim}

    def __setstate__(self, state: dict[str, int]) -> None:
        super().__init__(state["start"])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_the_mode_of_what_the_graph_does_not_use_is_nothing_to_it(duplicate):
    q, x = ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Begun(), nn.Linear(144, 2)).eval())
    copied = duplicate(q)
    assert copied[2].training
    assert computes_the_rule(q, x)
    assert torch.equal(copied(x), q(x))
    # A batch norm that the graph calls.
    copied[1].train()
    assert torch.equal(copied(x), copied.simulated_forward(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_copies(duplicate):
    q, x = ready()
    with torch.no_grad():
        expected = q(x)
        copied = duplicate(q)
        assert torch.equal(copied(x), expected)
        _write(q)
        assert torch.equal(copied(x), expected)


def test_in_double_precision():
    q, x = ready()
    with torch.no_grad():
        q(x)
        q.double()
        assert torch.equal(q(x.double()), defined(q, x.double()))
        assert q(x.double()).dtype is torch.float64


def test_hooks_see_the_graph_itself():
    q, x = ready()
    seen = []
    with torch.no_grad():
        for part in (q.norm, q.quantizers.fc_input):
            handle = part.register_forward_hook(lambda m, args, y: seen.append(m))
            assert torch.equal(q(x), q.simulated_forward(x))
            # Once in each.
            assert seen == [part, part]
            seen.clear()
            handle.remove()
            assert computes_the_rule(q, x)
        # One on the model itself runs as ever.
        handle = q.register_forward_hook(lambda m, args, y: seen.append(y))
        y = q(x)
        handle.remove()
        assert torch.equal(y, defined(q, x))
        assert len(seen) == 1 and seen[0] is y


def test_a_batch_norm_in_training_mode_has_no_integers():
    q, x = ready()
    q.norm.train()
    before = q.norm.running_mean.clone()
    with torch.no_grad():
        q(x)
    assert not torch.equal(q.norm.running_mean, before)


def test_weights_that_no_integer_stands_for():
    q, x = ready()
    with torch.no_grad():
        q.conv.weight[0, 0, 0, 0] = float("nan")
        with pytest.raises(OctavError, match=r"quantizers\.conv_weight.*inf or NaN"):
            q(x)


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_code_follows_the_state():
    q, x = ready()
    compiled = torch.compile(q, backend="octav")
    with torch.no_grad():
        assert torch.equal(compiled(x), defined(q, x))
        for change in (_load, _step, unfreeze, freeze):
            change(q)
            y = compiled(x)
            if change is unfreeze:
                # Sums of floats are taken in another order.
                torch.testing.assert_close(y, q.simulated_forward(x), rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(y, defined(q, x))
            assert torch.equal(y, compiled(x))


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_dynamo")
def test_where_compiled_code_breaks_for_a_new_state_nothing_that_compares_states_is_compiled(monkeypatch):
    compiled_of, compile_one = [], convert_frame._compile

    def recorded(code, *args, **kwargs):
        compiled_of.append(code.co_name)
        return compile_one(code, *args, **kwargs)

    monkeypatch.setattr(convert_frame, "_compile", recorded)
    q, x = ready()
    compiled = torch.compile(q, backend="eager")
    with torch.no_grad():
        compiled(x)
        for change in (_load, _step, unfreeze, freeze):
            change(q)
            compiled(x)
            compiled(x)
    assert "forward" in compiled_of
    assert not {"is_of", "is_same", "storage_id", "version_of"} & set(compiled_of)


def test_a_mean_of_a_batch_of_none():
    x = torch.randn(2, 3, 6, 6)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    q = freeze(calibrate(quantize(net, x, Config(residual_bits=8)), [x]))
    for integers in (True, False):
        assert convert(q, integers=integers)(x[:0]).shape == (0, 2)
