"""param_groups(): which parameters decay, each of them once; extra_state(): all that no state_dict holds."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import octav_fx
from octav_fx import Config, OctavError, param_groups, quantize
from octav_fx.capture.partial import PartialModule
from octav_fx.nn import FakeQuantizer
from octav_fx.optim import extra_state, load_extra_state
from tests.support.nets import ConvNet


class Tied(nn.Module):
    """An embedding that is the last layer's weight, norms of one axis and of two, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm((3, 4))
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.root_mean_square = nn.RMSNorm(4)
        self.last = nn.Linear(4, 7)
        self.last.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embedding(x))
        h = self.attention(h, h, h, need_weights=False)[0]
        return self.last(self.root_mean_square(self.frozen(h)))


class Loops(nn.Module):
    """A loop on data: no graph holds it, so that it is quantized in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet()

    def forward(self, x: Tensor) -> Tensor:
        while x.abs().max() > 4:
            x = x / 2
        return self.net(x)


def names(model: nn.Module, groups: list[dict]) -> list[list[str]]:
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return [[name_of[parameter] for parameter in group["params"]] for group in groups]


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8)


def test_param_groups__norms_and_biases_of_any_shape_do_not_decay_and_tied_weights_are_there_once():
    model = Tied()
    groups = param_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert names(model, groups) == [
        ["embedding.weight", "attention.in_proj_weight", "attention.out_proj.weight"],
        [
            *("norm.weight", "norm.bias"),
            *("attention.in_proj_bias", "attention.bias_k", "attention.bias_v", "attention.out_proj.bias"),
            *("root_mean_square.weight", "last.bias"),
        ],
    ]


@pytest.mark.parametrize("clip", ["octav", "lsq", "pact"])
def test_param_groups__a_quantized_model_has_the_groups_of_its_float_model_and_then_its_clips(clip):
    model = ConvNet()
    q = quantize(model, images(), Config(clip=clip))
    decayed, plain = names(q, param_groups(q, 0.1))
    of_float = names(model, param_groups(model, 0.1))
    assert decayed == of_float[0]
    clips = [name for name, _ in q.named_parameters() if name.endswith(".learned")]
    assert plain == of_float[1] + clips
    assert bool(clips) == (clip != "octav")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_param_groups__the_optimizer_moves_every_parameter_and_decays_weights_alone(optimizer):
    q = quantize(ConvNet(), images(), Config(clip="lsq"))
    before = {name: parameter.detach().clone() for name, parameter in q.named_parameters()}
    moving = optimizer(param_groups(q, 0.5), lr=0.1)
    for parameter in q.parameters():
        parameter.grad = torch.zeros_like(parameter)
    moving.step()
    for name, parameter in q.named_parameters():
        factor = 0.95 if name in ("conv.weight", "fc.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name], rtol=1e-6, atol=0)


def test_param_groups__of_models_in_parts_compiled_and_wrapped(single_process):
    q = quantize(Loops(), images(), Config(clip="lsq"))
    assert isinstance(q, PartialModule)
    expected = [group["params"] for group in param_groups(q, 0.1)]
    assert sum(len(params) for params in expected) == len(list(q.parameters()))
    for wrapped in (torch.compile(q), DistributedDataParallel(q), DistributedDataParallel(torch.compile(q))):
        found = [group["params"] for group in param_groups(wrapped, 0.1)]
        assert all(
            a is b for left, right in zip(found, expected, strict=True) for a, b in zip(left, right, strict=True)
        )


def test_param_groups__a_group_without_parameters_is_left_out():
    assert [group["weight_decay"] for group in param_groups(nn.Linear(2, 2, bias=False), 0.1)] == [0.1]
    assert [group["weight_decay"] for group in param_groups(nn.BatchNorm2d(2), 0.1)] == [0.0]


@pytest.mark.parametrize(
    ("model", "weight_decay", "says"),
    [
        (nn.ReLU(), 0.1, "ReLU has no trainable parameter"),
        (nn.Linear(2, 2).requires_grad_(False), 0.1, "Linear has no trainable parameter"),
        (nn.LazyLinear(2), 0.1, r"LazyLinear\.weight has no shape yet: run the model on a batch first"),
        (nn.Linear(2, 2), -0.1, r"weight_decay=-0\.1: a finite number from 0 on"),
        (nn.Linear(2, 2), float("nan"), "weight_decay=nan"),
    ],
)
def test_param_groups__what_cannot_be_grouped(model, weight_decay, says):
    with pytest.raises(OctavError, match=says):
        param_groups(model, weight_decay)


@pytest.fixture
def single_process():
    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def trained(clip: str, scale: float = 1.0) -> nn.Module:
    q = quantize(ConvNet(), scale * images(), Config(clip=clip))
    optimizer = torch.optim.SGD(param_groups(q, 0.1), lr=0.01)
    for _ in range(3):
        q(scale * images()).square().mean().backward()
        optimizer.step()
    return q


@pytest.mark.parametrize("clip", ["octav", "lsq", "pact"])
def test_extra_state__with_the_state_dict_it_is_all_of_a_model(clip):
    one, two = trained(clip), trained(clip, scale=5.0)
    file = io.BytesIO()
    torch.save((one.state_dict(), extra_state(one)), file)
    state, extra = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    two.load_state_dict(state)
    load_extra_state(two, extra)
    buffers = dict(one.named_buffers())
    assert any(name.endswith(".mean") for name in buffers)
    for name, value in (*two.named_buffers(), *two.named_parameters()):
        assert torch.equal(value, buffers[name] if name in buffers else one.get_parameter(name)), name
    # Nothing has to be calibrated again.
    x = images()
    assert torch.equal(octav_fx.freeze(two).eval()(x), octav_fx.freeze(one).eval()(x))


def learned_in(q: nn.Module) -> list[FakeQuantizer]:
    return [m for m in q.modules() if isinstance(m, FakeQuantizer) and m.learned is not None]


def test_extra_state__a_learned_clip_that_has_seen_no_data_still_begins_with_the_first():
    """The state_dict alone would take the number that it holds until then for a learned one."""
    one = quantize(ConvNet(), images(), Config(clip="pact"))
    learned_in(one)[0].initialized = False
    two = copy.deepcopy(one)
    two.load_state_dict(one.state_dict())
    assert all(quantizer.initialized for quantizer in learned_in(two))
    load_extra_state(two, extra_state(one))
    x = 3 * images()
    assert torch.equal(two(x), one(x))
    for name, parameter in one.named_parameters():
        assert torch.equal(two.get_parameter(name), parameter), name


def test_extra_state__names_do_not_depend_on_what_wraps_the_model(single_process):
    q = trained("octav")
    expected = extra_state(q)
    assert "quantizers.conv_input" in expected
    for wrapped in (torch.compile(q), DistributedDataParallel(q), DistributedDataParallel(torch.compile(q))):
        assert extra_state(wrapped).keys() == expected.keys()
        load_extra_state(wrapped, expected)


def test_extra_state__is_a_copy():
    q = trained("octav")
    state = extra_state(q)
    kept = copy.deepcopy(state)
    q(7 * images())
    for name, values in state.items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(kept[name][k])) for k, v in values.items())


def test_extra_state__of_a_float_model_is_empty():
    assert extra_state(ConvNet()) == {}
    load_extra_state(ConvNet(), {})


def test_extra_state__of_another_model_changes_nothing():
    q, other = trained("octav"), trained("octav", scale=3.0)
    before, state = extra_state(q), extra_state(other)
    del state["quantizers.fc_input"]
    with pytest.raises(OctavError, match=r"of another model: quantizers\.fc_input is not in it"):
        load_extra_state(q, state)
    state = extra_state(other)
    state["quantizers.conv_weight"]["hint"] = torch.zeros(9)
    with pytest.raises(OctavError, match=r"quantizers\.conv_weight is \{'hint': \[9\]\}, here \{'hint': \[4\]\}"):
        load_extra_state(q, state)
    for name, values in extra_state(q).items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(before[name][k])) for k, v in values.items())
