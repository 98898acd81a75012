"""The linear layers of a frozen model: names, codes, what rounds their inputs; and all that such a file cannot say."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octav_fx
from octav_fx import Config, OctavError
from octav_fx.deploy.layers import float_state, linear_layers

ALONE = Config(4, None, edge_bits=None)
BOTH = Config(4, 8, edge_bits=None)


def frozen(model: nn.Module, x: Tensor, config: Config, **options: object) -> nn.Module:
    q = octav_fx.quantize(model.eval(), x, config, **options)
    return octav_fx.freeze(octav_fx.calibrate(q, [x]))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96, bias=False), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("blocks", [None, [Block]])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group-32"])
def test_each_layer_by_its_name_with_the_levels_that_it_computes_with(granularity, blocks):
    model, x = Net(), torch.randn(3, 64)
    q = frozen(model, x, Config(4, None, edge_bits=None, weight_granularity=granularity), blocks=blocks)
    layers = {layer.name: layer for layer in linear_layers(q)}
    assert set(layers) == {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    # The float model with the levels for its weights is the frozen model.
    with torch.no_grad():
        for name, layer in layers.items():
            assert layer.input is None
            model.get_submodule(name).weight.copy_(layer.weight())
        assert torch.equal(model(x), q(x))


def test_what_rounds_the_input():
    q = frozen(Net(), torch.randn(3, 64), BOTH)
    signs = {layer.name: layer.input.spec.format.signed for layer in linear_layers(q)}
    assert signs.pop("blocks.0.down") is signs.pop("blocks.1.down") is False
    assert all(signs.values())
    assert all(layer.input.clip is not None for layer in linear_layers(q))


def test_keys_are_those_of_the_float_model():
    q = frozen(Net(), torch.randn(3, 64), BOTH)
    assert list(float_state(q)) == list(Net().state_dict()) != list(q.state_dict())


class Codec(nn.Module):
    """Has quantizers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.quantizers, self.net = nn.ModuleList([nn.Linear(64, 64)]), Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.quantizers[0](x))


def test_keys_of_a_model_with_quantizers_of_its_own():
    q = frozen(Codec(), torch.randn(3, 64), BOTH, blocks=[Block])
    assert list(float_state(q)) == list(Codec().state_dict())


def test_names_are_those_in_the_part_that_is_given():
    q = frozen(Codec(), torch.randn(3, 64), ALONE, blocks=[Block])
    assert {layer.name for layer in linear_layers(q.net.blocks)} == {"0.up", "0.down", "1.up", "1.down"}


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x) @ self.key(x).transpose(-1, -2)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(10 * self.layer(x))


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.change = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight + self.change)


@pytest.mark.parametrize(
    "model, x, named",
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 8), "0 input is quantized"),
        (Product(), torch.randn(2, 4, 8), "matmul input is quantized"),
        (Added(), torch.randn(2, 8), "linear input is quantized"),
        (Twice(), torch.randn(2, 8), "layer is called several times, with other clips of its input"),
    ],
)
def test_what_a_file_of_linear_layers_cannot_say(model, x, named):
    with pytest.raises(OctavError, match=named):
        linear_layers(frozen(model, x, BOTH))


def test_a_layer_that_is_called_twice_with_a_float_input():
    assert [layer.name for layer in linear_layers(frozen(Twice(), torch.randn(2, 8), ALONE))] == ["layer"]


def test_models_without_a_clip_or_a_layer():
    x = torch.randn(2, 64)
    with pytest.raises(OctavError, match=r"call octav_fx\.calibrate"):
        linear_layers(octav_fx.quantize(Net(), x, ALONE))
    with pytest.raises(OctavError, match="no weight of a linear layer is quantized"):
        linear_layers(frozen(Net(), x, Config(overrides={"*": None})))


def test_a_weight_that_no_code_stands_for():
    q = frozen(Net(), torch.randn(2, 64), ALONE)
    with torch.no_grad():
        q.head.weight[0, 0] = torch.inf
    with pytest.raises(OctavError, match=r"head\.weight holds inf or NaN"):
        linear_layers(q)
