"""param_groups(): which parameters decay, each of them once."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from octav_fx import Config, OctavError, param_groups, quantize
from octav_fx.capture.partial import PartialModule
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


@pytest.fixture
def single_process():
    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


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
