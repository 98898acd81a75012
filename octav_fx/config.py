"""Config: how finely each operand is quantized. Plain values, JSON both ways."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from octav_fx.clips.distributed import SYNCED
from octav_fx.clips.gradients import GRADIENTS
from octav_fx.clips.learned import LEARNED
from octav_fx.clips.newton import METHODS
from octav_fx.errors import OctavError

_BITS: Final = range(2, 9)
# What an override may set for a node.
_OVERRIDABLE: Final = ("weight_bits", "activation_bits", "clip", "weight_gradient", "activation_gradient")


@dataclass(frozen=True)
class Config:
    """The defaults are the paper's recipe: 4 bits, 8 at the edge, MAD for weights and PWL for activations (MPH)."""

    weight_bits: int = 4
    activation_bits: int = 4
    # Bits of the first convolutions and last linear layers; None: no exception for them.
    edge_bits: int | None = 8
    # Bits of both inputs of a sum that joins two paths and of the input of a global pool; None: they stay float.
    # Integer runtimes are fast only with it: passes/prepare/quantize_residuals.py.
    residual_bits: int | None = None
    # "octav" (eq. 6), "octav-grid" (the same step on the grid itself), "octav-tight" (eq. 6 with rounding counted four
    # times, made for transformers), "max" (no clipping): clips/newton.py.
    # "percentile-99.9" ("percentile" for short), "percentile-99.99", "percentile-99.999": clips/percentile.py.
    # "mse", the best of 100 clips by the true error: clips/mse.py.
    # "pact", a learned clip for activations, weights are clipped at their maximum ("max"); "lsq", a learned step for
    # both, per channel for weights. Both are parameters of the model: clips/learned.py.
    clip: str = "octav"
    # "mad", "pwl" or "ste": clips/gradients.py. A learned clip has its paper's, which is "pwl": the default of
    # weight_gradient does not apply to it, and any other choice than "pwl" is refused.
    weight_gradient: str = "mad"
    activation_gradient: str = "pwl"
    # "operands": q, k and v of a fused attention are quantized, its softmax output is not. "full": the attention is
    # taken apart (passes/prepare/decompose_attention.py) and the softmax output quantized too, as in the paper.
    attention: str = "operands"
    # Leave batch norm as it is (default), or fold it where it is in eval mode: passes/prepare/fold_batchnorm.py.
    fold_batchnorm: bool = False
    # In training mode of a distributed run, as in SyncBatchNorm: the clip of an activation is that of what all ranks
    # hold, for "max" and those named after octav. Weights are the same on every rank without it, and learned clips
    # that begin with the example inputs. Every rank has to run the same forwards. How many collectives that takes:
    # clips/distributed.py.
    sync_clip: bool = False
    # Node name or glob -> fields to change there, or None to leave the node float. Exact name > last matching glob.
    overrides: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "edge_bits", "residual_bits"):
            value = getattr(self, name)
            if value is not None or name in ("weight_bits", "activation_bits"):
                _check_bits(name, value)
        _check_choice("clip", self.clip, (*METHODS, *LEARNED))
        _check_choice("weight_gradient", self.weight_gradient, GRADIENTS)
        _check_choice("activation_gradient", self.activation_gradient, GRADIENTS)
        self._check_learned()
        if not isinstance(self.sync_clip, bool):
            raise OctavError(f"sync_clip={self.sync_clip!r}: True or False")
        if self.sync_clip and self.clip not in (*SYNCED, *LEARNED):
            raise OctavError(
                f"sync_clip=True with clip={self.clip!r}, which needs all values in one place: sums over ranks give "
                f"{', '.join(map(repr, SYNCED))}"
            )
        _check_choice("attention", self.attention, ("operands", "full"))
        if not isinstance(self.overrides, Mapping):
            raise OctavError(f"overrides: a dict of node name or glob to settings, not {self.overrides!r}")
        for pattern, settings in self.overrides.items():
            if settings is None:
                continue
            if not isinstance(settings, Mapping) or (unknown := sorted(set(settings) - set(_OVERRIDABLE))):
                detail = (
                    f"unknown {unknown}" if isinstance(settings, Mapping) else f"{settings!r} is not a dict or None"
                )
                raise OctavError(f"overrides[{pattern!r}]: {detail}; a node can set {', '.join(_OVERRIDABLE)}")
            # The settings have to be valid by themselves, and laid over these.
            Config(**settings)
            dataclasses.replace(self, overrides={}, **settings)

    def _check_learned(self) -> None:
        if self.clip in LEARNED and self.activation_gradient != "pwl":
            raise OctavError(
                f"activation_gradient={self.activation_gradient!r}: a learned clip, clip={self.clip!r}, has the "
                "gradient of its paper, 'pwl'"
            )
        if self.clip == "lsq" and self.weight_gradient == "ste":
            raise OctavError("weight_gradient='ste': clip='lsq' has the gradient of its paper, 'pwl'")

    @property
    def learned(self) -> str | None:
        """Return the first clip, here or in an override, that is a parameter of the model; None if none is."""
        clips = [
            self.clip,
            *(settings["clip"] for settings in self.overrides.values() if settings and "clip" in settings),
        ]
        return next((clip for clip in clips if clip in LEARNED), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; from_dict is the way back."""
        return dataclasses.asdict(dataclasses.replace(self, overrides=dict(self.overrides)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Return the Config of to_dict's values; raise OctavError for a key that is not a field."""
        fields = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(fields)):
            raise OctavError(f"Config has no field {', '.join(unknown)}; it has {', '.join(fields)}")
        return cls(**values)

    def pattern_for(self, site: str) -> str | None:
        """Return the override that holds for a node: its exact name, else the last glob that matches."""
        if site in self.overrides:
            return site
        return next((p for p in reversed(list(self.overrides)) if fnmatch.fnmatchcase(site, p)), None)


def _check_bits(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value not in _BITS:
        raise OctavError(f"{name}={value!r}: whole bits from {_BITS.start} to {_BITS.stop - 1}")


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise OctavError(f"{name}={value!r}: one of {', '.join(repr(choice) for choice in choices)}")
