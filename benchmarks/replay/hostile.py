"""Small models that are hard to capture: each does something no graph has a place for, or hides what it multiplies.

The numbers in them are chosen so that no branch on data lies near to its other side.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """A part that one graph holds."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        """X [..., width] -> [..., width]."""
        y = F.gelu(self.fc(x)) * scale
        return y if shift is None else y + shift


class Around(nn.Module):
    """A convolution, a function of the model and its tokens, and a head: [B, 8, T] -> [B, T, 3]."""

    def __init__(self, between: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv1d(8, 8, 3, padding=1), Block(), nn.Linear(8, 3)
        self.between = between
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Call the function between the two."""
        out: Tensor = self.head(self.between(self, self.stem(x).transpose(1, 2)))
        return out


def branch_on_data(m: Any, y: Tensor) -> Tensor:
    return m.block(y) if y.sum() < 1e9 else y


def branch_in_the_open(m: Any, y: Tensor) -> Tensor:
    return y @ (m.block.fc.weight if y.sum() < 1e9 else y.transpose(1, 2))


def loop_over_values(m: Any, y: Tensor) -> Tensor:
    for count in y.abs().mean((1, 2)).mul(0).long().tolist():
        y = y + count
    return m.block(y)


def loop_over_unbind(m: Any, y: Tensor) -> Tensor:
    return torch.stack([m.block(token) for token in y.unbind(1)], 1)


def with_numpy(m: Any, y: Tensor) -> Tensor:
    return m.block(y) + torch.from_numpy(np.sign(y.detach().numpy()))


def generator(m: Any, y: Tensor) -> Tensor:
    def passes() -> Iterator[Tensor]:
        yield m.block(y)
        yield m.block(y, 2.0)

    return torch.stack(list(passes())).sum(0)


def generator_on_data(m: Any, y: Tensor) -> Tensor:
    def passes() -> Iterator[Tensor]:
        while float(y.detach().norm()) > 1e9:
            yield y
        yield m.block(y)

    return torch.stack(list(passes())).sum(0)


@torch.no_grad()
def without_gradients(m: Any, y: Tensor) -> Tensor:
    return m.block(y)


def partly_without_gradients(m: Any, y: Tensor) -> Tensor:
    with torch.no_grad():
        target = m.block(y)
    return m.block(y) - target


def in_bfloat16(m: Any, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        z = m.block(y)
    return z.float()


class _Doubled(torch.autograd.Function):
    """Twice the value, three times the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """X -> 2 x."""
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return three times the gradient."""
        return grads[0] * 3


def autograd_function(m: Any, y: Tensor) -> Tensor:
    return m.block(_Doubled.apply(y))


def checkpointed(m: Any, y: Tensor) -> Tensor:
    return checkpoint(m.block, y, use_reentrant=False) * max(1, int(y.sum() * 0))


def ways_to_call(m: Any, y: Tensor) -> Tensor:
    y = y * max(1, int(y.sum() * 0))
    return m.block(y) + m.block(y, shift=y) + m.block(y, 2.0) + m.block.forward(y)


def method_of_a_child(m: Any, y: Tensor) -> Tensor:
    return F.relu(m.block.fc(y * max(1, int(y.sum() * 0)))) + m.block.fc.weight.mean()


def recurrent(m: Any, y: Tensor) -> Tensor:
    return m.lstm(y)[0]


def einsums(m: Any, y: Tensor) -> Tensor:
    scores = torch.einsum("bik,bjk->bij", y, m.block(y)) / math.sqrt(8)
    return torch.einsum("bij,bjk->bik", scores.softmax(-1), y) + y @ m.block.fc.weight.t()


def spellings_of_products(m: Any, y: Tensor) -> Tensor:
    w = m.block.fc.weight
    z = torch.bmm(y, w.expand(len(y), -1, -1)) + torch.matmul(y, w) + torch.tensordot(y, w, dims=1)
    return torch.baddbmm(z, y, w.expand(len(y), -1, -1)) + torch.addmm(w[0], y.flatten(0, 1), w).view_as(z)


def written_in_place(m: Any, y: Tensor) -> Tensor:
    z = m.block(y).clone()
    z[:, 0] = 0
    z[:, 1:].mul_(2).add_(y[:, 1:])
    return z


def cached_table(m: Any, y: Tensor) -> Tensor:
    if not hasattr(m, "table"):
        m.table = torch.arange(y.shape[1]).float()[:, None] / 8
    return m.block(y + m.table)


def branch_on_size(m: Any, y: Tensor) -> Tensor:
    if y.shape[1] > 3:
        y = F.pad(y, (0, 0, 0, 8 - y.shape[1]))
    return m.block(y).view(y.shape[0], -1, 8)


def doubled_in_training(m: Any, y: Tensor) -> Tensor:
    return m.block(y) * 2 if m.training else m.other(y)


def shared_weights(m: Any, y: Tensor) -> Tensor:
    return m.other(m.block(m.block(y))) + F.linear(y, m.block.fc.weight)


def functional_norm(m: Any, y: Tensor) -> Tensor:
    z = m.block(y).transpose(1, 2)
    z = F.batch_norm(z, m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias, m.training)
    return z.transpose(1, 2)


def hooked() -> nn.Module:
    net = Around(branch_on_data)
    net.block.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    net.block.register_forward_hook(lambda module, args, y: y + 1)
    return net


def tied() -> nn.Module:
    net = Around(shared_weights, other=Block())
    other: Any = net.other
    other.fc.weight = net.block.fc.weight
    return net


@dataclass
class Output:
    """What some libraries return."""

    logits: Tensor
    features: tuple[Tensor, ...] = ()
    loss: Tensor | None = None


class Structured(nn.Module):
    """Keyword arguments behind a decorator, a dict in, a dataclass out, a cache that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Block(), Block()

    def forward(self, x: Tensor, cache: dict[str, Tensor] | None = None, **options: Any) -> Output:
        """X [B, T, 8] and a cache [B, S, 8] -> logits [B, S + T, 8]."""
        y = self.one(x)
        if cache is not None:
            y = torch.cat([cache["past"], y], 1)
        features = (x, y) if options.get("output_features") else ()
        return Output(self.two(y), features)


class Grouped(nn.Module):
    """Convolutions of every kind: grouped, depthwise, transposed, dilated, in one and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.depthwise = nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8, padding="same")
        self.up, self.norm = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2), nn.BatchNorm2d(4)
        self.dilated = nn.Conv2d(4, 4, 3, dilation=2, padding=2, padding_mode="reflect")
        self.flat, self.deep = nn.Conv1d(4, 4, 3), nn.Conv3d(1, 2, 3)
        self.back = nn.ConvTranspose1d(4, 4, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """X [B, 4, H, W] -> [B, 3]."""
        y = self.norm(self.up(F.relu6(self.depthwise(F.silu(self.grouped(x))))))
        y = self.dilated(F.hardswish(y))
        line = self.back(self.flat(y.mean(3)).relu())
        volume = self.deep(y.unsqueeze(1)).amax((2, 3, 4))
        out: Tensor = self.head(torch.cat([y.mean((2, 3)), line.mean(2)], 1) + volume.repeat(1, 4))
        return out


class Inner(nn.Module):
    """A part that has to come apart itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        """Take the first block, by the data."""
        out: Tensor = self.a(x) if x.sum() < 1e9 else self.b(x)
        return out


class Outer(nn.Module):
    """Two levels of Python, shared parts, containers, parts that never run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(8, 8, 1)
        self.layers = nn.ModuleList([nn.ModuleDict({"one": Block(), "two": Inner()}) for _ in range(2)])
        first, second = self.layers
        assert isinstance(first, nn.ModuleDict) and isinstance(second, nn.ModuleDict)
        second["one"] = first["one"]
        self.idle, self.twice = nn.Linear(8, 4), Block()
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))
        self.offset = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """X [B, 8, T] -> logits [B, T, 3] and features [B, T, 8]."""
        y = self.stem(x).transpose(1, 2) + self.offset
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            y = y + layer["two"](layer["one"](y)) * max(1, int(y.sum() * 0))
        y = self.twice(y) + self.twice(y, shift=y) + self.twice(y, 2.0)
        return {"logits": self.head(y), "features": y}


class Auxiliary(nn.Module):
    """A norm, dropout, and a second head in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.drop = nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.main, self.aux = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        """X [B, 8, T] -> [B, T, 3], in training [B, T, 2] too."""
        y = self.drop(self.norm(self.stem(x)).relu()).transpose(1, 2)
        return (self.main(y), self.aux(y)) if self.training else self.main(y)


def shifted(x: Tensor, w: Tensor, *, shift: int = 0) -> Tensor:
    """A contraction that no rule of ours knows by this name."""
    return torch.tensordot(x, w.roll(shift, 0), dims=1)


class Shifting(nn.Module):
    """A function of the user's with a rule for it, and a block that may be a leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.block, self.head = nn.Parameter(torch.randn(8, 8)), Block(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """X [B, T, 8] -> [B, T, 3]."""
        out: Tensor = self.head(self.block(shifted(w=self.w, x=x, shift=1).relu()))
        return out


class Decorated(nn.Module):
    """A forward behind a decorator that looks at its arguments, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(8, 3)

    @staticmethod
    def _with_defaults(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            kwargs.setdefault("scale", 2.0)
            return function(self, *args, **kwargs)

        return wrapped

    @_with_defaults
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """X [..., 8] -> [..., 3]."""
        out: Tensor = self.head(self.block(x, scale))
        return out
