"""state() and load_state(): all that the state_dict of a quantized model does not hold."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import octav_fx
from octav_fx import Config, OctavError, param_groups, quantize
from octav_fx.nn import FakeQuantizer
from tests.support.nets import ConvNet


@pytest.fixture
def single_process():
    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8)


def trained(clip: str, scale: float = 1.0) -> nn.Module:
    q = quantize(ConvNet(), scale * images(), Config(clip=clip))
    optimizer = torch.optim.SGD(param_groups(q, 0.1), lr=0.01)
    for _ in range(3):
        q(scale * images()).square().mean().backward()
        optimizer.step()
    return q


@pytest.mark.parametrize("clip", ["octav", "lsq", "pact"])
def test_with_the_state_dict_it_is_all_of_a_model(clip):
    one, two = trained(clip), trained(clip, scale=5.0)
    file = io.BytesIO()
    torch.save((one.state_dict(), octav_fx.state(one)), file)
    state, extra = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    two.load_state_dict(state)
    octav_fx.load_state(two, extra)
    buffers = dict(one.named_buffers())
    assert any(name.endswith(".mean") for name in buffers)
    for name, value in (*two.named_buffers(), *two.named_parameters()):
        assert torch.equal(value, buffers[name] if name in buffers else one.get_parameter(name)), name
    # Nothing has to be calibrated again.
    x = images()
    assert torch.equal(octav_fx.freeze(two).eval()(x), octav_fx.freeze(one).eval()(x))


def learned_in(q: nn.Module) -> list[FakeQuantizer]:
    return [m for m in q.modules() if isinstance(m, FakeQuantizer) and m.learned is not None]


def test_a_learned_clip_that_has_seen_no_data_still_begins_with_the_first():
    """The state_dict alone would take the number that it holds until then for a learned one."""
    one = quantize(ConvNet(), images(), Config(clip="pact"))
    learned_in(one)[0].initialized = False
    two = copy.deepcopy(one)
    two.load_state_dict(one.state_dict())
    assert all(quantizer.initialized for quantizer in learned_in(two))
    octav_fx.load_state(two, octav_fx.state(one))
    x = 3 * images()
    assert torch.equal(two(x), one(x))
    for name, parameter in one.named_parameters():
        assert torch.equal(two.get_parameter(name), parameter), name


def test_names_do_not_depend_on_what_wraps_the_model(single_process):
    q = trained("octav")
    expected = octav_fx.state(q)
    assert "quantizers.conv_input" in expected
    for wrapped in (torch.compile(q), DistributedDataParallel(q), DistributedDataParallel(torch.compile(q))):
        assert octav_fx.state(wrapped).keys() == expected.keys()
        octav_fx.load_state(wrapped, expected)


def test_is_a_copy():
    q = trained("octav")
    state = octav_fx.state(q)
    kept = copy.deepcopy(state)
    q(7 * images())
    for name, values in state.items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(kept[name][k])) for k, v in values.items())


def test_of_a_float_model_is_empty():
    assert octav_fx.state(ConvNet()) == {}
    octav_fx.load_state(ConvNet(), {})


def test_of_another_model_changes_nothing():
    q, other = trained("octav"), trained("octav", scale=3.0)
    before, state = octav_fx.state(q), octav_fx.state(other)
    del state["quantizers.fc_input"]
    with pytest.raises(OctavError, match=r"of another model: quantizers\.fc_input is not in it"):
        octav_fx.load_state(q, state)
    state = octav_fx.state(other)
    state["quantizers.conv_weight"]["hint"] = torch.zeros(9)
    with pytest.raises(OctavError, match=r"quantizers\.conv_weight is \{'hint': \[9\]\}, here \{'hint': \[4\]\}"):
        octav_fx.load_state(q, state)
    for name, values in octav_fx.state(q).items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(before[name][k])) for k, v in values.items())


class Halves(nn.Module):
    """Multiplies a second time where it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        return self.two(self.one(x).relu()) if twice else self.one(x)


@pytest.mark.parametrize("clip", ["octav", "lsq"])
def test_graphs_that_later_calls_brought_are_examples_of_the_next_run(clip):
    torch.manual_seed(0)
    model, x = Halves(), torch.randn(4, 8)
    one = quantize(model, x, Config(clip=clip))
    one(2 * x, twice=True)
    two = quantize(model, x, Config(clip=clip))
    with pytest.raises(OctavError, match=r"quantizers\.two_input is .*, here not there.* and examples="):
        octav_fx.load_state(two, octav_fx.state(one))
    two = quantize(model, x, Config(clip=clip), examples=[{"x": x, "twice": True}])
    two.load_state_dict(one.state_dict())
    octav_fx.load_state(two, octav_fx.state(one))
    assert torch.equal(two(x, twice=True), one(x, twice=True))
    for name, values in octav_fx.state(one).items():
        found = octav_fx.state(two)[name]
        assert all(torch.equal(torch.as_tensor(found[key]), torch.as_tensor(v)) for key, v in values.items())
