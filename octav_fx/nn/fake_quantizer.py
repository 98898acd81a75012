"""FakeQuantizer: the module that stands before one operand. Until it is frozen its state is a hint and a mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from octav_fx.clips.learned import LEARNED, clip_from_parameter, initial_clip, parameter_for
from octav_fx.compat.modules import buffers_of
from octav_fx.compat.tensors import normal_tensors
from octav_fx.errors import OctavError
from octav_fx.formats.spec import Spec

# The child of a quantized module that holds its quantizers.
QUANTIZERS: Final = "quantizers"

# How far one training step moves the running mean of the clips: that of BatchNorm.
MOMENTUM: Final = 0.1
# So many steps that nothing is left of where the running mean began.
_MANY: Final = 1000


@dataclass(frozen=True, slots=True)
class Settings:
    """How one operand is quantized. Two operands with equal value and equal Settings share one quantizer."""

    spec: Spec
    method: str
    gradient: str
    # In training mode the clip is that of what all ranks of a distributed run hold.
    sync: bool = False


def as_autocast(x: Tensor) -> Tensor:
    """Convert x [...] as a layer under autocast does, where autocast is on; float32 alone."""
    device = x.device.type
    if x.is_meta or x.dtype is not torch.float32 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


class FakeQuantizer(nn.Module):
    """x [...] -> x on the grid of its own optimal clip, [...].

    hint, of the shape of the clip, is the clip of the last call: where Newton starts, never what is used. It is not
    part of the state_dict, so a checkpoint of the float model loads with strict=True, and losing it changes no result.

    mean [] or [C] and steps [], of an operand that is data: the running mean of the clips in training mode, begun at
    zero, and of how many. Freezing may use them; nothing else does.
    clip [] or [C]: None, or the static clip of a frozen quantizer, which is part of the state_dict. Loading one
    freezes; loading a state without one into a frozen quantizer is an error.
    learned [] or [C]: None, or the parameter of a clip that is learned ("pact": the clip, "lsq": the step), float32 and
    part of the state_dict. It begins with the first data, as begun says. A state without one loads, too: it is a
    float model's. The clip of a weight then begins anew, that of data stays.
    """

    hint: Tensor
    mean: Tensor | None
    steps: Tensor | None
    clip: Tensor | None
    learned: nn.Parameter | None

    def __init__(
        self,
        settings: Settings,
        shape: tuple[int, ...] = (),
        device: torch.device | None = None,
        *,
        running: bool = False,
    ) -> None:
        super().__init__()
        self.settings = settings
        # Whether it is data: what a clip belongs to differs from call to call.
        self.running = running
        averages = running and not self.by_row
        self.register_buffer("hint", torch.zeros(shape, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("mean", torch.zeros_like(self.hint) if averages else None, persistent=False)
        steps = torch.zeros((), dtype=torch.float32, device=device) if averages else None
        self.register_buffer("steps", steps, persistent=False)
        self.register_buffer("clip", None)
        is_learned = settings.method in LEARNED
        self.register_parameter("learned", nn.Parameter(torch.ones_like(self.hint)) if is_learned else None)
        self.initialized = False

    @property
    def used(self) -> Tensor:
        """Return the clip of the last call, [] or [C]; the clip itself where it is learned."""
        if self.clip is not None:
            return self.clip
        return (
            self.hint
            if self.learned is None
            else clip_from_parameter(self.learned.detach(), self.spec.format, self.settings.method)
        )

    @property
    def by_row(self) -> bool:
        """Tell whether it finds a clip for each row of data, always: there is no state, and nothing to freeze."""
        return self.running and self.spec.granularity.is_short

    @property
    def spec(self) -> Spec:
        """Return how the numbers are represented."""
        return self.settings.spec

    def clip_of(self, x: Tensor) -> Tensor:
        """Return the clip that the last call gave x [...]; found anew where rows of data have one each."""
        if not self.by_row:
            return self.used
        return torch.ops.octav.optimal_clip(x.detach(), self.hint, str(self.spec), self.settings.method)

    def init_from_data(self, x: Tensor) -> None:
        """Set a learned clip to where its method begins for x [...]; the hint becomes that clip."""
        assert self.learned is not None
        spec, method = self.spec, self.settings.method
        with torch.no_grad():
            rows = spec.granularity.rows(x.detach())
            rows = rows.to(torch.promote_types(x.dtype, torch.float32))
            self.hint.copy_(spec.granularity.of_rows(initial_clip(rows, spec.format, method), x.shape))
            self.learned.copy_(parameter_for(self.hint, spec.format, method))
        self.initialized = True

    @property
    def average(self) -> Tensor | None:
        """Return the running mean of the clips, [] or [C]; None before the first."""
        if self.mean is None or self.steps is None or not self.steps:
            return None
        # As in Adam: what is left of the zero that it began with is divided out.
        return self.mean / (1 - (1 - MOMENTUM) ** self.steps.double())

    @average.setter
    def average(self, value: Tensor) -> None:
        assert self.mean is not None and self.steps is not None
        self.mean.copy_(value)
        self.steps.fill_(_MANY)

    def forward(self, x: Tensor) -> Tensor:
        """Round x [...] to the nearest levels of its grid [...]; the clip that was used becomes the hint.

        Under autocast data is rounded in its dtype, which is what the layer would convert it to.
        """
        if isinstance(x, fx.Proxy):
            # For any tracer of torch.fx it is a leaf, like the modules of torch.
            tracer: Any = x.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {})
        settings, spec = self.settings, str(self.spec)
        if x.is_nested:
            raise OctavError(
                f"a nested tensor of {x.dim()} axes has no grid of its own: give the model a padded one, "
                "x.to_padded_tensor(0.0), and a mask, or the rows of all sequences, x.values()"
            )
        if self.spec.granularity.size is not None and not self.spec.granularity.divides(x.shape):
            raise OctavError(
                f"x of shape {tuple(x.shape)} for the granularity {self.spec.granularity}: does not divide"
            )
        if self.running:
            x = as_autocast(x)
        if self.clip is not None:
            return torch.ops.octav.fake_quantize(x, self.clip, spec, settings.gradient)
        if self.learned is not None:
            if not self.initialized:
                self.init_from_data(x)
            return torch.ops.octav.learned_fake_quantize(x, self.learned, spec, settings.method, self.running)
        if settings.sync and self.training and dist.is_available() and dist.is_initialized():
            clip = torch.ops.octav.synced_clip(x.detach(), self.hint, spec, settings.method)
            y = torch.ops.octav.fake_quantize(x, clip, spec, settings.gradient)
        else:
            y, clip = torch.ops.octav.dynamic_fake_quantize(x, self.hint, spec, settings.method, settings.gradient)
        if self.by_row:
            return y
        if torch.compiler.is_exporting():
            # torch.export.load refuses a program with torch.no_grad in it.
            self.keep(clip.detach())
        else:
            with torch.no_grad():
                self.keep(clip)
        return y

    def keep(self, clip: Tensor) -> None:
        """Take the clip of a call, [] or [C], for the hint, and in training for the mean."""
        self.hint.copy_(clip)
        if self.training and self.mean is not None and self.steps is not None:
            self.mean.lerp_(clip, MOMENTUM)
            self.steps.add_(1)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        had_data = not self.hint.is_meta
        learned = None if self.learned is None else self.learned.data
        super()._apply(fn, recurse)
        if self.learned is not None and learned is not None and self.learned.dtype is not torch.float32:
            self.learned.data = learned.to(self.learned.device)
        # .half() and .to(bfloat16) convert floating-point buffers; a clip is float32 whatever the model is.
        for name, value in buffers_of(self).items():
            buffers_of(self)[name] = None if value is None else value.to(torch.float32)
        if not had_data and not self.hint.is_meta and self.mean is not None and self.steps is not None:
            # What to_empty() leaves must not pass for a mean.
            self.mean.zero_()
            self.steps.zero_()
        if not had_data and not self.hint.is_meta:
            self.initialized = False
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if self.clip is None and f"{prefix}clip" in state_dict:
            with normal_tensors():
                self.clip = torch.zeros_like(self.hint)
        if self.learned is not None:
            known = f"{prefix}learned" in state_dict
            # A weight's clip can begin at once, on every rank alike.
            self.initialized = known or (self.initialized and self.running)
            if not known:
                # Without it in the state it would count as missing; it stays.
                state_dict = {**state_dict, f"{prefix}learned": self.learned.detach()}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Show the spec, the clip and the gradient."""
        return f"{self.spec}, {self.settings.method}, {self.settings.gradient}"
