"""module: the user's module tree seen through a graph; it copies, pickles, switches modes and stays in step."""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx.capture.modules import QuantizedModule
from octav_fx.capture.whole import WholeModule
from octav_fx.errors import NotCaptured, OctavError
from octav_fx.ir.table.contractions import CONTRACTIONS
from tests.support.graphs import model, run_alike


class Net(nn.Module):
    """A tied weight, a shared buffer, a batch norm, a dropout and a branch on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 4, bias=False)
        self.bn = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("shift", torch.ones(4))
        self.scale = nn.Parameter(torch.full((4,), 2.0))
        self.head = nn.Linear(6, 4, bias=False)
        self.head.weight = self.embed.weight
        self.width, self.names = 4, ["a", "b"]

    def forward(self, x: Tensor, flip: bool = False) -> Any:
        y = self.drop(self.bn(self.embed(x))) * self.scale + self.shift
        y = -y if flip else y
        return (y, self.head(x)) if self.training else y

    def helper(self) -> int:
        return self.width


X = torch.randn(5, 6)


def quantized() -> QuantizedModule:
    return octav_fx.quantize(Net(), X)


def round_trip(q: QuantizedModule) -> QuantizedModule:
    return pickle.loads(pickle.dumps(q))


def saved(q: QuantizedModule) -> QuantizedModule:
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, round_trip, saved, lambda q: round_trip(copy.deepcopy(round_trip(q)))]


@pytest.mark.parametrize("duplicate", COPIES, ids=["deepcopy", "pickle", "torch.save", "all"])
@pytest.mark.parametrize("training", [True, False])
def test_a_copy_computes_the_same_and_shares_nothing(duplicate: Any, training: bool) -> None:
    q = quantized().train(training)
    again = duplicate(q)
    assert type(again).__name__ == "Net" and again.training is training
    for mode in (training, not training):
        assert run_alike(q.train(mode), again.train(mode), X)
    assert list(again.state_dict()) == list(q.state_dict())
    kinds = [{name: type(m) for name, m in module.named_modules() if name} for module in (q, again)]
    assert kinds[0] == kinds[1]

    own = {t.data_ptr() for t in (*q.parameters(), *q.buffers())}
    assert not own & {t.data_ptr() for t in (*again.parameters(), *again.buffers())}
    assert again.head.weight is again.embed.weight and again.embed.weight is not q.embed.weight
    assert all(m.hint.all() for m in again.quantizers.children())
    assert octav_fx.coverage(again) == octav_fx.coverage(q)
    with octav_fx.float_mode(q), octav_fx.float_mode(again):
        assert run_alike(q, again, X)


@pytest.mark.parametrize("duplicate", COPIES[:2], ids=["deepcopy", "pickle"])
def test_training_a_copy_leaves_the_original(duplicate: Any) -> None:
    q = quantized().eval()
    before, again = q(X), duplicate(q).train()
    optimizer = torch.optim.SGD(again.parameters(), 0.1)
    sum(y.sum() for y in again(X)).backward()
    optimizer.step()
    assert torch.equal(q(X), before)
    assert not torch.equal(again.eval()(X), before)
    # The float forward of the copy runs on the state of the copy.
    with octav_fx.float_mode(again):
        y = F.batch_norm(
            X @ again.embed.weight.t(), again.bn.running_mean, again.bn.running_var, again.bn.weight, again.bn.bias
        )
        assert torch.equal(again(X), y * again.scale + again.shift)


def test_a_copy_made_inside_float_mode_is_quantized() -> None:
    q = quantized().eval()
    with octav_fx.float_mode(q):
        again = round_trip(q)
    assert torch.equal(again(X), q(X))


@pytest.mark.parametrize("duplicate", COPIES[:2], ids=["deepcopy", "pickle"])
def test_a_copy_of_what_holds_it_keeps_ties_across_its_border(duplicate: Any) -> None:
    q = quantized().eval()
    again = duplicate(nn.ModuleDict({"inner": q, "tied": q.embed}))
    assert again["tied"] is again["inner"].embed and again["tied"] is not q.embed
    assert torch.equal(again["inner"](X), q(X))


UNPICKLED = {
    "overload": torch.ops.aten.relu.default,
    "packet": torch.ops.aten.relu,
    # Not by the protocol of torch.save.
    "memory format": lambda x: x.clone(memory_format=torch.contiguous_format),
    # Functions that a function of torch has made.
    "pool": lambda x: F.max_pool1d(x, 2),
    "adaptive pool": lambda x: F.adaptive_max_pool1d(x, 2),
    "distinct": lambda x: torch.unique(x, dim=0),
}


class Calling(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.fc, self.name = nn.Linear(6, 4), name

    def forward(self, x: Tensor) -> Any:
        return UNPICKLED[self.name](self.fc(x))


@pytest.mark.parametrize("name", UNPICKLED)
@pytest.mark.parametrize("duplicate", COPIES[:3], ids=["deepcopy", "pickle", "torch.save"])
def test_what_torch_itself_does_not_pickle(name: str, duplicate: Any) -> None:
    q = octav_fx.quantize(Calling(name), X)
    assert torch.equal(duplicate(q)(X), q(X))


@pytest.mark.slow
def test_long_graphs_copy_and_pickle() -> None:
    # fx nodes link to their neighbours: pickled as they are, 1600 of them are deeper than Python's stack.
    x = torch.randn(2, 4)
    q = octav_fx.quantize(nn.Sequential(*(nn.Identity() for _ in range(1600)), nn.Linear(4, 4)), x)
    assert len(q.graph.nodes) > 1600
    assert run_alike(q, round_trip(q), x) and run_alike(q, copy.deepcopy(q), x)


@pytest.mark.parametrize("op", CONTRACTIONS, ids=lambda op: op.name)
def test_every_function_that_a_graph_can_call_pickles(op: Any) -> None:
    for function in (op.target, *op.functions):
        if not isinstance(function, torch._ops.OpOverload):
            assert pickle.loads(pickle.dumps(function)) is function


class Arguments(nn.Module):
    def forward(self, x: Tensor, y: Tensor | None = None, *, flag: bool = True) -> dict[str, Any]:
        z = x[:, None, ::2, ...].expand(-1, 2, -1).to(torch.float32, memory_format=torch.contiguous_format)
        z = torch.cat([z, torch.full(z.shape, 0.5, device=x.device)], dim=1)
        return {"z": z, "pair": (z.sum(), [z.mean()]), "size": z.shape, "none": y}


def test_arguments_of_all_kinds_pickle() -> None:
    q = octav_fx.quantize(Arguments(), {"x": X, "flag": True})
    assert run_alike(q, round_trip(q), X, flag=True) and run_alike(q, Arguments(), X)


def test_constants_of_forward_are_copied_and_move_with_the_module() -> None:
    table = torch.arange(6.0)
    float_module = model(lambda self, x: self.fc(x + table), fc=nn.Linear(6, 2))
    q = octav_fx.quantize(float_module, X)
    again = copy.deepcopy(q)
    assert "_tensor_constant0" in dict(again.named_buffers()) and "_tensor_constant0" not in again.state_dict()
    assert again.double()._tensor_constant0.dtype is torch.float64 and q._tensor_constant0.dtype is torch.float32


class TestFloatForward:
    def test_after_load_state_dict(self) -> None:
        q, other = quantized().eval(), Net().eval()
        q.load_state_dict(other.state_dict())
        assert torch.equal(q.float_forward(X), other(X))

    def test_after_a_submodule_was_replaced(self) -> None:
        q = quantized().eval()
        q.head, q.embed = nn.Linear(6, 4), nn.Linear(6, 4)
        y = q.bn(q.embed(X)) * q.scale + q.shift
        assert torch.equal(q.float_forward(X), y)

    def test_after_a_parameter_and_a_buffer_were_replaced(self) -> None:
        q = quantized().eval()
        q.scale, q.shift = nn.Parameter(torch.zeros(4)), torch.full((4,), 3.0)
        assert torch.equal(q.float_forward(X), torch.full((5, 4), 3.0))

    def test_in_another_dtype(self) -> None:
        q = quantized().eval().to(torch.float64)
        x = X.double()
        expected = q.bn(F.linear(x, q.embed.weight)) * q.scale + q.shift
        assert expected.dtype is torch.float64 and torch.equal(q.float_forward(x), expected)
        assert q(x).dtype is torch.float64

    def test_in_both_modes(self) -> None:
        q = quantized()
        assert isinstance(q.train().float_forward(X), tuple)
        assert isinstance(q.eval().float_forward(X), Tensor)

    def test_sees_no_quantizers_among_its_children(self) -> None:
        def forward(self, x):
            for part in self.children():
                x = part(x)
            return x

        q = octav_fx.quantize(model(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 2)), X)
        with octav_fx.float_mode(q):
            assert torch.equal(q.float_forward(X), q.b(q.a(X)))

    def test_as_float_nests_and_ends_with_an_error(self) -> None:
        q = quantized().eval()
        expected = q(X)
        with pytest.raises(ValueError), q.as_float():
            with q.as_float():
                assert torch.equal(q(X), q.float_forward(X))
            assert torch.equal(q(X), q.float_forward(X))
            raise ValueError
        assert torch.equal(q(X), expected) and not torch.equal(expected, q.float_forward(X))


def test_modes_switch_graphs() -> None:
    q = quantized()
    assert q.training and q.modes == (True, False)
    training_graph = q.graph
    assert isinstance(q(X), tuple)
    assert isinstance(q.eval()(X), Tensor) and q.graph is not training_graph and not q.bn.training
    assert q.train().graph is training_graph and q.train(False).modes == (False, True)
    again = octav_fx.quantize(Net().eval(), X)
    assert not again.training and isinstance(again(X), Tensor) and isinstance(again.train()(X), tuple)


def test_one_graph_serves_both_modes_where_no_code_asks_for_the_mode() -> None:
    q = octav_fx.quantize(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout()), X)
    graph = q.graph
    assert q.modes == (True,) and q.eval().graph is graph and q.modes == (False,)
    assert torch.equal(q(X), q(X)) and not torch.equal(q.train()(X), q(X))


@pytest.mark.slow
def test_a_mode_that_was_not_captured_is_captured_when_it_is_called() -> None:
    def forward(self, x):
        return x if self.training or x.sum() > 0 else -x

    q = octav_fx.quantize(model(forward).train(), X)
    assert torch.equal(q(X), X)
    with pytest.warns(UserWarning, match=r"run its own Python, over quantized children: .*depends on the data"):
        assert torch.equal(q.eval()(X.abs()), X.abs())
    assert torch.equal(q(-X.abs()), X.abs())
    assert torch.equal(q.train()(X), X)


def test_the_float_module_given_to_quantize_stays_apart() -> None:
    float_module = Net()
    q = octav_fx.quantize(float_module, X)
    q.eval().scale.data.zero_()
    assert float_module.training and torch.equal(float_module.scale, torch.full((4,), 2.0))
    assert [name for name, _ in float_module.named_children()] == ["embed", "bn", "drop", "head"]


RESERVED = ["quantizers", "graph", "code", "recompile", "print_readable", "to_folder"]


@pytest.mark.parametrize("name", RESERVED)
def test_a_child_or_parameter_of_a_reserved_name_cannot_be_in_a_graph_module(name: str) -> None:
    for part in (nn.Linear(6, 2), nn.Parameter(torch.ones(6))):
        with pytest.raises(NotCaptured, match=rf"Model\.{name}: octav_fx needs that name; rename the attribute"):
            QuantizedModule(model(lambda self, x: x, **{name: part}), {}, {})
    float_module = model(lambda self, x: getattr(self, name)(x), **{name: nn.Linear(6, 2)})
    q = octav_fx.quantize(float_module, X, strict=True)
    assert isinstance(getattr(q, name), WholeModule)
    with octav_fx.float_mode(q):
        assert torch.equal(q(X), float_module(X))
    assert not torch.equal(q(X), float_module(X))


def test_attributes_and_methods_are_those_of_the_users_class() -> None:
    q = quantized()
    assert isinstance(q, Net) and (type(q).__name__, type(q).__module__) == ("Net", __name__)
    assert q.width == 4 and q.names == ["a", "b"] and q.helper() == 4
    with pytest.raises(AttributeError, match="'Net' object has no attribute 'nothing'"):
        _ = q.nothing
    assert inspect.signature(q.forward) == inspect.signature(Net().forward)
    for again in (copy.deepcopy(q), round_trip(q)):
        assert again.width == 4 and again.names == q.names and again.names is not q.names


def test_hooks_on_the_root_run_once() -> None:
    calls: list[str] = []
    float_module = nn.Sequential(nn.Linear(6, 2))
    float_module.register_forward_pre_hook(lambda module, args: calls.append("before"))
    float_module.register_forward_hook(lambda module, args, y: calls.append("after") or y * 2)
    expected = float_module(X)
    q = octav_fx.quantize(float_module, X)
    calls.clear()
    y = q(X)
    assert calls == ["before", "after"]
    calls.clear()
    with octav_fx.float_mode(q):
        assert torch.equal(q(X), expected)
    assert calls == ["before", "after"]
    handle = q.register_forward_hook(lambda module, args, y: y * 0)
    assert not q(X).any()
    handle.remove()
    assert torch.equal(q(X), y)


def test_a_sequential_root() -> None:
    float_module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    x = torch.randn(2, 1, 4, 4)
    q = octav_fx.quantize(float_module, x)
    assert list(q.state_dict()) == list(float_module.state_dict())
    assert torch.equal(q.float_forward(x), float_module(x))
    assert run_alike(q, round_trip(q), x) and run_alike(q, copy.deepcopy(q), x)


@pytest.mark.parametrize("root", [nn.Linear(6, 3), nn.Conv1d(5, 3, 3)], ids=lambda m: type(m).__name__)
def test_a_root_that_is_a_layer_of_torch(root: nn.Module) -> None:
    q = octav_fx.quantize(root, X)
    assert list(q.state_dict()) == list(root.state_dict())
    with octav_fx.float_mode(q):
        assert run_alike(q, root, X)
    assert run_alike(q, round_trip(q), X)


class Named(nn.Module):
    """Names that a GraphModule has too, a property, and methods."""

    kind = "named"

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.graph, self.meta, self.code, self.records = "a graph", "data about data", 7, []

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).relu()

    @property
    def doubled(self) -> int:
        return self.code * 2

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(-1)

    def features(self, x: Tensor) -> Tensor:
        return self.fc(x)


@pytest.mark.parametrize("duplicate", [lambda q: q, *COPIES])
def test_names_of_the_users_are_the_users(duplicate: Any) -> None:
    q = duplicate(octav_fx.quantize(Named().eval(), X))
    assert isinstance(q, Named) and q.kind == "named" and q.doubled == 14
    assert (q.graph, q.meta, q.code, q.records) == ("a graph", "data about data", 7, [])
    assert torch.equal(q.predict(X), q(X).argmax(-1))
    q.code = 8
    assert q.doubled == 16


def test_a_method_that_would_compute_in_float_is_refused() -> None:
    q = octav_fx.quantize(Named(), X)
    with pytest.raises(OctavError, match=r"fc of Named would compute in float here: .*blocks=\[\.\.\.\]"):
        q.features(X)
    with pytest.raises(OctavError, match="fc of Named would compute in float here"):
        q.fc(X)
    with octav_fx.float_mode(q):
        assert torch.equal(q.features(X), F.linear(X, q.fc.weight, q.fc.bias))


@pytest.mark.parametrize("duplicate", [lambda q: q, *COPIES])
def test_hooks_on_what_a_graph_holds_fire_or_are_refused(duplicate: Any) -> None:
    q, calls = duplicate(quantized().eval()), list[str]()
    for module, name in ((q, "root"), (q.bn, "bn")):
        module.register_forward_hook(lambda module, args, y, name=name: calls.append(name))
    q(X)
    assert calls == ["bn", "root"]
    for register in ("forward_pre", "forward", "full_backward", "full_backward_pre"):
        with pytest.raises(OctavError, match="embed of Net would never run this hook"):
            getattr(q.embed, f"register_{register}_hook")(lambda *_: None)
    assert torch.equal(q(X), q(X))


def test_a_container_does_not_count_the_quantizers() -> None:
    float_module = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    q = octav_fx.quantize(float_module, X)
    assert isinstance(q, nn.Sequential) and len(q) == 3
    assert [type(m) for m in q] == [nn.Linear, nn.ReLU, nn.Linear] and q[-1] is list(q)[2]
    assert q[2] in q and q.quantizers not in q
    assert "quantizers.0_weight" in dict(q.named_modules())
    assert torch.equal(q(X), q(X)) and len(copy.deepcopy(q)) == 3
