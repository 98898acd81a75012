"""float_mode: the float model, bit for bit, for a while."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octav_fx import OctavError, float_mode, quantize
from tests.support.nets import ConvNet


class Net(ConvNet):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.fc(F.dropout(x, 0.5, self.training))


def pair(training: bool = False) -> tuple[nn.Module, nn.Module, Tensor]:
    model, x = Net().train(training), torch.randn(4, 3, 8, 8)
    return model, quantize(model, x), x


def test_output_is_the_float_models_and_the_quantized_one_returns():
    model, q, x = pair()
    quantized = q(x)
    assert not torch.equal(quantized, model(x))
    with float_mode(q):
        assert torch.equal(q(x), model(x))
    assert torch.equal(q(x), quantized)


def test_a_training_step_inside_is_a_float_step():
    model, q, x = pair(training=True)
    outputs = []
    with float_mode(q):
        for module in (model, q):
            torch.manual_seed(1)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
            for _ in range(2):
                optimizer.zero_grad()
                outputs.append(module(x))
                outputs[-1].square().sum().backward()
                optimizer.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs[2:], outputs[:2], strict=True))
    for ours, theirs in zip(q.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


class Losing(nn.Module):
    """Of a dict, as detectors do, the loss; of a tensor what a layer makes of it. Its _apply takes what it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def _apply(self, fn):
        return super()._apply(fn)

    def forward(self, x):
        if isinstance(x, dict):
            return self.forward(x["x"]).square().sum() if x["x"].sum() > 0 else None
        return self.fc(x)


@pytest.mark.filterwarnings("ignore:Losing")
def test_a_forward_that_calls_itself_computes_in_float_and_runs_its_own_python_else():
    model, x = Losing(), torch.rand(4, 8)
    q = quantize(model, x).to("cpu")
    with float_mode(q):
        assert torch.equal(q({"x": x}), model({"x": x}))
    loss = q({"x": x})
    assert not torch.equal(loss, model({"x": x})) and torch.allclose(loss, q(x).square().sum())


class Descending(nn.Module):
    """Calls itself by its class, with an argument that another graph is for."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        return self.fc(type(self).forward(self, x, depth - 1)) if depth else x


def test_a_forward_that_calls_that_of_its_class_computes_in_float():
    model, x = Descending(), torch.rand(4, 8)
    q = quantize(model, (x, 2))
    for depth in (2, 1, 3):
        with float_mode(q):
            assert torch.equal(q(x, depth), model(x, depth))
        assert not torch.equal(q(x, depth), model(x, depth))


def test_the_mode_can_change_inside():
    model, q, x = pair(training=True)
    with float_mode(q):
        assert torch.equal(q.eval()(x), model.eval()(x))
        assert not q.norm.training
    assert not q.training


def test_parameters_changed_since_are_the_ones_used():
    model, q, x = pair()
    with torch.no_grad():
        for p in (*model.parameters(), *q.parameters()):
            p.mul_(1.5)
    model.fc, q.fc = (copy.deepcopy(nn.Linear(4, 2)) for _ in range(2))
    q.fc.load_state_dict(model.fc.state_dict())
    with float_mode(q):
        assert torch.equal(q(x), model(x))


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda q: nn.ModuleDict({"student": q})["student"]])
def test_nested_in_a_module_of_the_users(wrap):
    model, q, x = pair()
    outer = wrap(q)
    with float_mode(outer):
        assert torch.equal(outer(x), model(x))
    assert torch.equal(outer(x), q(x))


def test_every_quantized_module_inside_takes_part():
    one, two = nn.Linear(8, 8), nn.Linear(8, 8)
    x = torch.randn(2, 8)
    both = nn.Sequential(quantize(one, x), quantize(two, x))
    with float_mode(both):
        assert torch.equal(both(x), two(one(x)))


def test_twice_and_one_inside_the_other():
    model, q, x = pair()
    quantized = q(x)
    with float_mode(q):
        with float_mode(q):
            assert torch.equal(q(x), model(x))
        assert torch.equal(q(x), model(x))
    assert torch.equal(q(x), quantized)


def test_an_exception_inside_ends_it():
    _, q, x = pair()
    quantized = q(x)
    with pytest.raises(ZeroDivisionError), float_mode(q):
        raise ZeroDivisionError
    assert torch.equal(q(x), quantized)
    with pytest.raises(RuntimeError), float_mode(q):
        q(torch.randn(1, 7, 8, 8))
    assert torch.equal(q(x), quantized)


def test_a_copy_made_inside_is_quantized():
    _, q, x = pair()
    with float_mode(q):
        copied = copy.deepcopy(q)
    assert torch.equal(copied(x), q(x))


def test_hooks_run_inside_too():
    _, q, x = pair()
    seen = []
    q.register_forward_hook(lambda module, args, out: seen.append(out))
    with float_mode(q):
        q(x)
    assert len(seen) == 1


def test_compiled_after_the_quantized_graph_was():
    model, q, x = pair()
    compiled = torch.compile(q, backend="eager")
    quantized = compiled(x)
    with float_mode(q):
        assert torch.equal(compiled(x), model(x))
    assert torch.equal(compiled(x), quantized)


def test_nothing_quantized_is_an_error():
    with (
        pytest.raises(OctavError, match=r"Linear holds no module that octav_fx\.quantize returned"),
        float_mode(nn.Linear(2, 2)),
    ):
        pass
