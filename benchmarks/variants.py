"""The ways to train a model that are compared: what is done to it before the first step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import octav_fx
from benchmarks.models import MODELS
from benchmarks.peers import PEERS
from octav_fx.clips.gradients import GRADIENTS
from octav_fx.formats.grid import Grid
from octav_fx.nn import FakeQuantizer, Settings


@dataclass(frozen=True, slots=True)
class Variant:
    """From a float model and a batch to what is trained, its parameters included."""

    prepare: Callable[[nn.Module, Tensor], nn.Module]
    # A torch.compile backend, or None: eager.
    backend: str | None = None
    # What the backend is asked for besides.
    options: dict[str, Any] | None = None
    note: str = ""
    # Forward runs under torch.autocast in bfloat16.
    autocast: bool = False
    # Of benchmarks/models.py, those that it can train.
    models: tuple[str, ...] = MODELS


class _Plain(torch.autograd.Function):
    """Eq. 6 ten times from the mean, then rounding, as one would write it first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: Settings) -> Tensor:
        grid, shared = settings.spec.format, settings.spec.granularity
        assert isinstance(grid, Grid)
        rows = shared.rows(x)
        magnitude = rows.abs()
        clip = magnitude.sum(-1) / (magnitude > 0).sum(-1).clamp(min=1)
        for _ in range(10):
            above = magnitude > clip.unsqueeze(-1)
            inside = ((magnitude > 0) & ~above).sum(-1)
            clip = (magnitude * above).sum(-1) / (grid.noise * inside + above.sum(-1))
        bound = shared.along(shared.of_rows(clip, x.shape), x)
        ctx.save_for_backward(x, bound)
        ctx.settings = settings
        step = grid.step(bound)
        return (x / step).round().clamp(grid.low, grid.high) * step

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, bound = ctx.saved_tensors
        return grads[0] * GRADIENTS[ctx.settings.gradient](x, bound, ctx.settings.spec.format.signed), None


class _PlainQuantizer(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, x: Tensor) -> Any:
        return _Plain.apply(x, self.settings)


def _plain(model: nn.Module, x: Tensor) -> nn.Module:
    quantized = octav_fx.quantize(model, x)
    for name, module in list(quantized.named_modules()):
        if isinstance(module, FakeQuantizer):
            quantized.set_submodule(name, _PlainQuantizer(module.settings))
    return quantized


def _as_is(model: nn.Module, x: Tensor) -> nn.Module:
    return model


def _groups_and_tokens(model: nn.Module, x: Tensor) -> nn.Module:
    return octav_fx.quantize(model, x, octav_fx.Config.preset("w4a8-g32-token"))


_INTEGER = {"integer": "auto"}
_HALF = {**_INTEGER, "backward": "bfloat16"}
OWN = {
    "float eager": Variant(_as_is),
    "float Inductor": Variant(_as_is, "inductor"),
    "octav compiled": Variant(octav_fx.quantize, "octav"),
    "octav compiled, integer": Variant(octav_fx.quantize, "octav", _INTEGER),
    "octav compiled, integer, backward in bf16": Variant(octav_fx.quantize, "octav", _HALF),
    "octav compiled, w4a8-g32-token": Variant(_groups_and_tokens, "octav", models=("encoder",)),
    "octav eager": Variant(octav_fx.quantize),
    "ten cold Newton steps, plain PyTorch eager": Variant(_plain),
}
# What they are compared with is float under the same autocast.
AUTOCAST = {
    "float Inductor, bf16 autocast": Variant(_as_is, "inductor", autocast=True),
    "octav compiled, bf16 autocast": Variant(octav_fx.quantize, "octav", autocast=True),
    "octav compiled, integer, bf16 autocast": Variant(octav_fx.quantize, "octav", _INTEGER, autocast=True),
}
# With options that a GPU profits from.
FOR_GPU = {
    "octav compiled, levels kept, solve by one step": Variant(
        octav_fx.quantize, "octav", {"keep": "levels", "solve": "step"}
    ),
}
VARIANTS = {
    **OWN,
    **AUTOCAST,
    **FOR_GPU,
    **{name: Variant(peer.prepare, note=peer.note) for name, peer in PEERS.items()},
}
