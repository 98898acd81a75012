"""Nets of the recipes: small relatives of ResNet-18, MobileNetV2, EfficientNet-B0, GoogLeNet and GPT-2, any width."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResNet(nn.Module):
    """ResNet-18 with a 3x3 stem for small images: [N, 1, H, W] -> [N, classes]; channels width, 2, 4 and 8 times it."""

    def __init__(self, classes: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.stem = _conv_bn(1, width, 3, stride)
        stages = []
        channels = width
        for stage in range(4):
            out = width * 2**stage
            for block in range(2):
                stages.append(BasicBlock(channels, out, stride=2 if stage and not block else 1))
                channels = out
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(x.mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_bn(channels, out, 3, stride)
        self.second = _conv_bn(out, out, 3)
        self.shortcut = nn.Identity() if channels == out and stride == 1 else _conv_bn(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, channels, H, W] -> [N, out, H / stride, W / stride]."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


# Expansion, channels over the width, repeats, stride of the first.
_INVERTED: Final = ((1, 1, 1, 1), (6, 1.5, 2, 2), (6, 2, 2, 2), (6, 4, 2, 1))


class InvertedResidual(nn.Module):
    """1x1 up, 3x3 depthwise, 1x1 down without an activation (Sandler et al., arXiv 1801.04381)."""

    def __init__(self, channels: int, out: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = _conv_bn(channels, wide, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _conv_bn(wide, wide, 3, stride, groups=wide)
        self.project = _conv_bn(wide, out, 1)
        self.is_residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, channels, H, W] -> [N, out, H / stride, W / stride]."""
        y = self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))
        return x + y if self.is_residual else y


class GatedResidual(InvertedResidual):
    """InvertedResidual with SiLU, and a gate for each channel from the mean of all: squeeze and excitation."""

    def __init__(self, channels: int, out: int, expansion: int, stride: int) -> None:
        super().__init__(channels, out, expansion, stride)
        wide, narrow = channels * expansion, max(channels // 4, 4)
        self.squeeze, self.excite = nn.Conv2d(wide, narrow, 1), nn.Conv2d(narrow, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, channels, H, W] -> [N, out, H / stride, W / stride]."""
        # What comes without an expansion has been through SiLU.
        y = x if isinstance(self.expand, nn.Identity) else F.silu(self.expand(x))
        y = F.silu(self.depthwise(y))
        gate = self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True))))
        y = self.project(y * gate.sigmoid())
        return x + y if self.is_residual else y


class MobileNet(nn.Module):
    """MobileNetV2 with fewer blocks: [N, 1, H, W] -> [N, classes]."""

    block: type[InvertedResidual] = InvertedResidual
    activation: Callable[[Tensor], Tensor] = staticmethod(F.relu6)

    def __init__(self, classes: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.stem = _conv_bn(1, width, 3, stride)
        blocks = []
        channels = width
        for expansion, factor, repeats, stride in _INVERTED:
            out = int(width * factor)
            for repeat in range(repeats):
                blocks.append(self.block(channels, out, expansion, stride if repeat == 0 else 1))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.last = _conv_bn(channels, 4 * channels, 1)
        self.head = nn.Linear(4 * channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        x = self.activation(self.last(self.blocks(self.activation(self.stem(x)))))
        return self.head(x.mean((2, 3)))


class EfficientNet(MobileNet):
    """EfficientNet-B0 (Tan and Le, arXiv 1905.11946) with the blocks of MobileNet: [N, 1, H, W] -> [N, classes]."""

    block = GatedResidual
    activation = staticmethod(F.silu)


class InceptionBlock(nn.Module):
    """Four paths of the same input, concatenated: 1x1, 3x3, twice 3x3 and a pool (Szegedy et al., arXiv 1409.4842)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        part, narrow = out // 4, out // 8
        self.one = _conv_bn(channels, part, 1)
        self.three = nn.Sequential(_conv_bn(channels, narrow, 1), nn.ReLU(), _conv_bn(narrow, part, 3))
        self.five = nn.Sequential(
            _conv_bn(channels, narrow, 1), nn.ReLU(), _conv_bn(narrow, part, 3), nn.ReLU(), _conv_bn(part, part, 3)
        )
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv_bn(channels, part, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, channels, H, W] -> [N, out, H, W]."""
        return torch.cat([F.relu(path(x)) for path in (self.one, self.three, self.five, self.pooled)], 1)


class Inception(nn.Module):
    """Six inception blocks of 4, 8 and 16 times the width, pools between: [N, 1, H, W] -> [N, classes]."""

    def __init__(self, classes: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.stem = _conv_bn(1, width, 3, stride)
        stages: list[nn.Module] = []
        channels = width
        for stage in range(3):
            out = 4 * width * 2**stage
            pool = [nn.MaxPool2d(3, 2, 1)] if stage else []
            stages += [*pool, InceptionBlock(channels, out), InceptionBlock(out, out)]
            channels = out
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class Transformer(nn.Module):
    """A causal transformer over bytes, normalised before each part: int64 [N, T] -> logits [N, T, symbols].

    Positions are rotations of queries and keys (arXiv 2104.09864): attention to the bytes just before is learned in the
    first steps. With learned positions it begins late, at a moment that differs from seed to seed.
    """

    def __init__(self, symbols: int, width: int, depth: int, heads: int, length: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, depth, length) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols)
        nn.init.normal_(self.symbols.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map bytes to the logits of the byte after each."""
        return self.head(self.norm(self.blocks(self.symbols(x))))


class TransformerBlock(nn.Module):
    """Attention and a GELU layer of four times the width, each beside its input."""

    turns: Tensor

    def __init__(self, width: int, heads: int, depth: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        half = width // heads // 2
        angles = torch.outer(torch.arange(length), 10_000.0 ** (-torch.arange(half) / half))
        self.register_buffer("turns", torch.stack([angles.cos(), angles.sin()]), persistent=False)
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        # GPT-2: what is added to the residual stream starts smaller the more of it there is.
        added = (2 * depth) ** -0.5
        for linear, gain in ((self.qkv, 1.0), (self.up, 1.0), (self.out, added), (self.down, added)):
            nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, T, width] -> [N, T, width]."""
        count, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(count, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        cos, sin = self.turns[:, :length]
        mixed = F.scaled_dot_product_attention(_turned(q, cos, sin), _turned(k, cos, sin), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(count, length, width))
        return x + self.down(F.gelu(self.up(self.norm(x))))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of features of x [N, heads, T, D], as plane vectors, by angles [T, D / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def _conv_bn(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(out))
