"""Frozen models to deploy, and one comparison for whatever computes the same: layer by layer, from equal operands."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octav_fx import Config, calibrate, freeze, quantize, zoo
from octav_fx.capture.modules import QuantizedModule
from octav_fx.formats.granularity import along
from octav_fx.nn import FakeQuantizer, StaticQuantizer

models = zoo.torchvision().models
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Encoder(nn.Module):
    """As BERT: token and position embeddings, attention written out, layer norms, a pooled head."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, width), nn.Embedding(16, width)
        self.layers = nn.ModuleList(nn.ModuleDict(_layer(width)) for _ in range(layers))
        self.head, self.heads = nn.Linear(width, 3), heads

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            q, k, v = (layer[n](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in ("query", "key", "value"))
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            weights = scores.masked_fill(mask[:, None, None, :] == 0, -1e4).softmax(-1)
            x = layer["norm1"](x + layer["out"]((weights @ v).transpose(1, 2).flatten(2)))
            x = layer["norm2"](x + layer["down"](F.gelu(layer["up"](x))))
        return self.head(torch.tanh(x[:, 0]))


class GPT(nn.Module):
    """Causal, fused attention, one projection for q, k and v, the output layer tied to the embedding."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, width), nn.Parameter(0.1 * torch.randn(16, width))
        self.blocks = nn.ModuleList(nn.ModuleDict(_block(width)) for _ in range(layers))
        self.norm, self.head, self.heads = nn.LayerNorm(width), nn.Linear(width, 50, bias=False), heads
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            parts = block["qkv"](block["norm1"](x)).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
            x = x + block["out"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x)), approximate="tanh"))
        return self.head(self.norm(x))


class Relative(nn.Module):
    """Scores against keys that parameters are made into, in a stack of matrices, as DeBERTa has them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out, self.table = nn.Linear(8, 8), nn.Linear(5, 4), nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        keys = self.fc(self.table)[None].repeat(x.shape[0], 1, 1)
        return self.out(self.fc(x) @ keys.mT)


class Text(nn.Module):
    """Embeddings, an encoder layer of PyTorch's, and one whose queries, keys and values are chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, 16), nn.Embedding(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
        self.project, self.head = nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layer(self.tokens(tokens) + self.places.weight[: tokens.shape[1]])
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x.mean(1))


class Branches(nn.Module):
    """A detector's: halves that are concatenated, pools side by side, a skip to what is enlarged again."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.few = _conv(3, width), _conv(width // 2, width // 2)
        self.joined, self.down = _conv(3 * width // 2, width), _conv(width, width)
        self.pools, self.up = _conv(3 * width, width), _conv(2 * width, width)
        self.pool, self.head = nn.MaxPool2d(3, 1, 1), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.stem(x).chunk(2, 1)
        skip = self.joined(torch.cat([first, second, self.few(second)], 1))
        x = self.down(F.max_pool2d(skip, 2))
        once = self.pool(x)
        x = self.pools(torch.cat([x, once, self.pool(once)], 1))
        x = self.up(torch.cat([F.interpolate(x, scale_factor=2), skip], 1))
        return self.head(x.mean((2, 3)))


def _conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def _layer(width: int) -> dict[str, nn.Module]:
    square = {name: nn.Linear(width, width) for name in ("query", "key", "value", "out")}
    norms = {name: nn.LayerNorm(width) for name in ("norm1", "norm2")}
    return {**square, **norms, "up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)}


def _block(width: int) -> dict[str, nn.Module]:
    return {**_layer(width), "qkv": nn.Linear(width, 3 * width)}


def images(batch: int = 2, size: int = 32) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, size, size),)


def tokens(batch: int = 2) -> tuple[Tensor, ...]:
    return (torch.randint(0, 50, (batch, 12)),)


def rows_of_tokens(batch: int = 2) -> tuple[Tensor, ...]:
    return (torch.randint(0, 20, (batch, 8)),)


def masked_tokens(batch: int = 2) -> tuple[Tensor, ...]:
    mask = torch.ones(batch, 12, dtype=torch.int64)
    mask[:, 9:] = 0
    return (*tokens(batch), mask)


@dataclass(frozen=True)
class Case:
    """How a model is made and fed."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]


def named(name: str, **options: Any) -> Case:
    return Case(lambda: zoo.load(name, num_classes=10, **options), images)


LANGUAGE = {"encoder": Case(Encoder, masked_tokens), "gpt": Case(GPT, tokens)}
WHOLE = {
    **{name: named(name) for name in ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large")},
    **{
        "efficientnet_b0": named("efficientnet_b0"),
        "swin_t": named("swin_t"),
        "vit_b_16": named("vit_b_16", image_size=32),
        "branches": Case(Branches, images),
    },
    **LANGUAGE,
}


def shortened() -> dict[str, Case]:
    """Every kind of block of the large models, fewer times: exporting and running them takes a time for each node."""
    resnet, efficient = models.resnet, models.efficientnet

    blocks = [efficient.MBConvConfig(*row) for row in ((1, 3, 1, 32, 16, 1), (6, 5, 2, 16, 40, 2))]
    inverted = [[1, 16, 1, 1], [6, 24, 2, 2]]
    return {
        "resnet18": Case(lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10), images),
        "resnet50": Case(lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10), images),
        "mobilenet_v2": Case(lambda: models.MobileNetV2(10, inverted_residual_setting=inverted), images),
        "mobilenet_v3": Case(lambda: models.MobileNetV3(_settings(), 64, num_classes=10), images),
        "efficientnet_b0": Case(lambda: efficient.EfficientNet(blocks, 0.2, num_classes=10), images),
        "swin_t": Case(lambda: models.SwinTransformer([4, 4], 24, [2, 1], [3, 6], [4, 4], num_classes=10), images),
        "vit_b_16": Case(
            lambda: models.vision_transformer.VisionTransformer(32, 16, 2, 4, 64, 128, num_classes=10), images
        ),
        "branches": Case(Branches, images),
        **LANGUAGE,
    }


def _settings() -> list[object]:
    make = models.mobilenetv3.InvertedResidualConfig
    rows = ((16, 3, 16, 16, True, "RE", 2, 1), (16, 5, 72, 24, True, "HS", 2, 1), (24, 5, 96, 24, True, "HS", 1, 1))
    return [make(*row, 1.0) for row in rows]


def made(case: Case) -> nn.Module:
    """In eval mode, as after training: statistics of any size, factors of both signs, one of them zero."""
    model = case.make().eval()
    for module in model.modules():
        if isinstance(module, NORMS):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 0.7, 0.5)
            nn.init.normal_(module.bias, 0, 0.3)
            module.weight.data[0], module.weight.data[1] = -1.5, 0.0
        if isinstance(module, nn.Linear) and not module.weight.any():
            # The head of a ViT begins at zero.
            nn.init.normal_(module.weight, 0, 0.02)
    return model


def frozen(case: Case, config: Config | None = None) -> tuple[QuantizedModule, tuple[Tensor, ...]]:
    inputs = case.inputs(2)
    q = quantize(made(case), inputs, config)
    freeze(calibrate(q, [inputs, case.inputs(2)]))
    return q, inputs


@dataclass(frozen=True)
class Seen:
    """What one call of an activation's quantizer was given, in steps of its grid, and the levels that it returned."""

    position: Tensor
    y: Tensor
    step: Tensor


def observed(q: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, list[Seen]], dict[str, Tensor]]:
    """The output of a frozen or converted model, its activations by the path of their quantizer, quantized weights."""
    activations: dict[str, list[Seen]] = {}
    weights: dict[str, Tensor] = {}
    handles = []
    for name, module in q.named_modules():
        if isinstance(module, FakeQuantizer):

            def hook(m: FakeQuantizer, args: tuple[Tensor], y: Tensor, name: str = name) -> None:
                step = m.clip / (2 ** (m.spec.format.bits - 1) if m.spec.format.signed else 2**m.spec.format.bits)
                if m.mean is None:
                    weights[name] = y.detach()
                else:
                    seen = Seen(args[0].detach().double() / step.double(), y.detach().clone(), step)
                    activations.setdefault(name, []).append(seen)

        elif isinstance(module, StaticQuantizer):

            def hook(m: StaticQuantizer, args: tuple[Tensor], y: Tensor, name: str = name) -> None:
                # Of a weight that is computed each channel has one.
                step = along(m.scale, args[0], m.dim)
                position = args[0].double() / (1 if m.in_steps else step.double())
                activations.setdefault(name, []).append(Seen(position, y.clone(), step))

        else:
            continue
        handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        out = q(*inputs)
    for handle in handles:
        handle.remove()
    return out, activations, weights


def levels_of(activations: dict[str, list[Seen]]) -> dict[str, list[Tensor]]:
    """What the quantizers returned."""
    return {name: [seen.y for seen in calls] for name, calls in activations.items()}


def forced(
    c: nn.Module, inputs: tuple[Tensor, ...], given: dict[str, list[Seen]]
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The output of a converted model and what its quantizers return, where every layer reads the levels given."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in c.named_modules():
        if isinstance(module, StaticQuantizer):

            def hook(m: nn.Module, args: tuple[Tensor], y: Tensor, name: str = name) -> Tensor:
                calls = found.setdefault(name, [])
                calls.append(y)
                # What reads it may write into it.
                return given[name][len(calls) - 1].y.clone()

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        out = c(*inputs)
    for handle in handles:
        handle.remove()
    return out, found


def check_codes(given: dict[str, list[Seen]], found: dict[str, list[Tensor]]) -> int:
    """Every code equal, or beside it where the value lies within 1e-5 of a tie; returns how many values do.

    Sums of the same two codes are one value, which a tensor may have a hundred times.
    """
    assert given.keys() == found.keys()
    moved = 0
    for name, calls in given.items():
        assert len(calls) == len(found[name]), name
        for seen, y in zip(calls, found[name], strict=True):
            step = seen.step.double()
            ours, theirs = (seen.y.double() / step).round(), (y.double() / step).round()
            differs = ours != theirs
            position = seen.position[differs]
            moved += position.unique().numel()
            distance = (position - position.floor() - 0.5).abs()
            # Relative to the value, and to the largest one that a value near zero is the difference of.
            bound = 1e-5 * torch.maximum(position.abs(), seen.position.abs().max())
            assert ((ours - theirs)[differs].abs() == 1).all(), name
            assert (distance <= bound).all(), (name, distance.max())
    return moved


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
