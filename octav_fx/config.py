"""Config: how finely each operand is quantized. Plain values, JSON both ways."""

import dataclasses
import fnmatch
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from octav_fx.clips.gradients import GRADIENTS
from octav_fx.clips.learned import LEARNED
from octav_fx.clips.methods import METHODS, SYNCED
from octav_fx.errors import OctavError
from octav_fx.formats.granularity import granularity
from octav_fx.formats.kmeans import KMEANS_BITS
from octav_fx.formats.registry import CODEBOOKS, NAMES
from octav_fx.formats.scales import SCALES

_Kind = TypeVar("_Kind", bound=type[Any])

_BITS: Final = range(2, 9)
# What an override may set for a node.
_OVERRIDABLE: Final = (
    *("weight_bits", "activation_bits", "clip", "weight_gradient", "activation_gradient"),
    *("weight_format", "activation_format", "weight_granularity", "activation_granularity", "scale_format"),
    *("signed_activations", "narrow_weights"),
)
_GRANULARITIES: Final = {"weight": ("tensor", "channel", "group"), "activation": ("tensor", "token", "group")}


def _with_named_fields(kind: _Kind) -> _Kind:
    """Let a dataclass raise OctavError for a keyword that is no field of it, and name those that are."""
    names, init = [field.name for field in dataclasses.fields(kind)], kind.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **settings: Any) -> None:
        if unknown := sorted(map(str, settings.keys() - set(names))):
            raise OctavError(f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(names)}")
        init(self, *args, **settings)

    kind.__init__ = checked
    return kind


@_with_named_fields
@dataclass(frozen=True)
class Config:
    """The defaults are the paper's recipe: 4 bits, 8 at the edge, MAD for weights and PWL for activations (MPH)."""

    # None: weights, or activations, stay float. A format with bits of its own has those, and other ones beside it are
    # refused.
    weight_bits: int | None = 4
    activation_bits: int | None = 4
    # Bits of the first convolutions and last linear layers: integers with float32 scales, by channel and tensor (or
    # token) where the others have groups. None: no exception for them.
    edge_bits: int | None = 8
    # Bits of both inputs of a sum that joins two paths, of the input of a global pool, of what a function such as SiLU
    # takes from a convolution, and of what several layers read of one, some behind a pool or as a part; None: they stay
    # float. Layers that all read it on equal grids, some behind max pools, share one quantizer of their own bits.
    # That of a global pool passes gradients straight ("ste") where no override says otherwise, and no clip is learned.
    # Integer runtimes are fast only with it: passes/prepare/quantize_residuals.py.
    residual_bits: int | None = None
    # "int", of so many bits; "kmeans", of 2 to 4: the best levels for each tensor, as granularity "tensor"; or a format
    # with bits of its own: "e2m1", "e4m3", "e5m2", "ternary", "zero-free", "pow2", "apot", "nf4", "nupes"
    # (octav_fx/formats/registry.py).
    weight_format: str = "int"
    activation_format: str = "int"
    # What a clip belongs to. "tensor"; weights: "channel"; activations: "token", each row along the axis that is summed
    # over; both: "group-32", so many neighbours along that axis. Of the values of an attention that axis is the
    # sequence: a token is then a channel of it, and what comes later counts in the clip.
    weight_granularity: str = "channel"
    activation_granularity: str = "tensor"
    # What scales are rounded to before codes are chosen: "float32", "bfloat16", "float16", "e8m0" (powers of two), or
    # "e4m3" under one float32 for the tensor (octav_fx/formats/scales.py).
    scale_format: str = "float32"
    # No unsigned grids: some runtimes have none.
    signed_activations: bool = False
    # Integer weights without the lowest code: -127 .. 127 of 8 bits.
    narrow_weights: bool = False
    # "octav" (eq. 6; for tokens, groups and levels that are not even the least error by search: clips/search.py),
    # "octav-grid" (the same step on the grid itself), "octav-tight" (eq. 6 with rounding counted four
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
    # Node name, or glob, or the name of a module for all in it; several with "|" between them; "name/operand" for one
    # operand; a class of modules for all in them -> fields to change there, or None to leave it float. Exact name > the
    # last that matches.
    overrides: Mapping[str | type, Mapping[str, Any] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "edge_bits", "residual_bits"):
            if getattr(self, name) is not None:
                _check_bits(name, getattr(self, name))
        for role in _GRANULARITIES:
            _check_choice(f"{role}_format", getattr(self, f"{role}_format"), NAMES)
            _check_granularity(role, getattr(self, f"{role}_granularity"))
        _check_choice("scale_format", self.scale_format, SCALES)
        for name in ("signed_activations", "narrow_weights", "fold_batchnorm", "sync_clip"):
            if not isinstance(getattr(self, name), bool):
                raise OctavError(f"{name}={getattr(self, name)!r}: True or False")
        _check_choice("clip", self.clip, (*METHODS, *LEARNED))
        _check_choice("weight_gradient", self.weight_gradient, GRADIENTS)
        _check_choice("activation_gradient", self.activation_gradient, GRADIENTS)
        self._check_learned()
        self._check_combination()
        if self.sync_clip and self.clip not in (*SYNCED, *LEARNED):
            raise OctavError(
                f"sync_clip=True with clip={self.clip!r}, which needs all values in one place: sums over ranks give "
                f"{', '.join(map(repr, SYNCED))}"
            )
        _check_choice("attention", self.attention, ("operands", "full"))
        if not isinstance(self.overrides, Mapping):
            raise OctavError(f"overrides: a dict of node name or glob to settings, not {self.overrides!r}")
        for pattern, settings in self.overrides.items():
            if not isinstance(pattern, (str, type)):
                raise OctavError(f"overrides[{pattern!r}]: no name and no class of modules")
            if settings is None:
                continue
            if not isinstance(settings, Mapping) or (unknown := sorted(set(settings) - set(_OVERRIDABLE))):
                detail = (
                    f"unknown {unknown}" if isinstance(settings, Mapping) else f"{settings!r} is not a dict or None"
                )
                raise OctavError(f"overrides[{pattern!r}]: {detail}; a node can set {', '.join(_OVERRIDABLE)}")
            try:
                # The settings have to be valid by themselves, and laid over these.
                Config(**settings)
                dataclasses.replace(self, overrides={}, **self._without_lost_bits(settings))
            except OctavError as error:
                raise OctavError(f"overrides[{pattern!r}]: {error}") from None

    def _without_lost_bits(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of an override as they are laid over these.

        A format with bits of its own takes the place of these bits. Raises OctavError for bits which the format that is
        there does not have.
        """
        laid = dict(settings)
        for role in _GRANULARITIES:
            bits, form = f"{role}_bits", f"{role}_format"
            name = settings.get(form, getattr(self, form))
            if bits in settings:
                _check_own_bits(role, name, settings[bits])
            elif form in settings and name in CODEBOOKS and getattr(self, bits) is not None:
                laid[bits] = CODEBOOKS[name].bits
        return laid

    def _check_learned(self) -> None:
        if self.clip in LEARNED and self.activation_gradient != "pwl":
            raise OctavError(
                f"activation_gradient={self.activation_gradient!r}: a learned clip, clip={self.clip!r}, has the "
                "gradient of its paper, 'pwl'"
            )
        if self.clip == "lsq" and self.weight_gradient == "ste":
            raise OctavError("weight_gradient='ste': clip='lsq' has the gradient of its paper, 'pwl'")

    def _check_combination(self) -> None:
        """Raise OctavError for a clip that levels, rows or scales as these cannot have."""
        even = self.clip in METHODS and METHODS[self.clip].even
        if even and (other := {self.weight_format, self.activation_format} - {"int"}):
            raise OctavError(f"clip={self.clip!r} is for evenly spaced levels, not for {', '.join(sorted(other))}")
        if even and self.narrow_weights:
            raise OctavError(f"clip={self.clip!r} counts on the lowest code, which narrow_weights=True leaves out")
        for role in _GRANULARITIES:
            if getattr(self, f"{role}_format") == "kmeans":
                self._check_kmeans(role)
            # The default is what nobody gave.
            if (bits := getattr(self, f"{role}_bits")) != getattr(Config, f"{role}_bits"):
                _check_own_bits(role, getattr(self, f"{role}_format"), bits)
        if self.clip in LEARNED and self.activation_granularity != "tensor":
            raise OctavError(
                f"clip={self.clip!r}: the rows of activation_granularity={self.activation_granularity!r} are others in "
                "each batch, and nothing can be learned about them"
            )
        if self.clip in LEARNED and self.scale_format != "float32":
            raise OctavError(f"clip={self.clip!r}: a learned clip is float32, not {self.scale_format!r}")
        if self.sync_clip and self.clip == "octav" and self.activation_format != "int":
            raise OctavError(f"sync_clip=True: the clip of {self.activation_format!r} needs all values in one place")
        has_rows = self.activation_bits is not None and self.activation_granularity != "tensor"
        if self.sync_clip and self.scale_format == "e4m3" and has_rows:
            raise OctavError(
                "sync_clip=True: above the scales of rows in scale_format='e4m3' is one float32 for the tensor, and a "
                "rank knows that of its own rows: give another format, or activation_granularity='tensor', not "
                f"{self.activation_granularity!r}"
            )

    def _check_kmeans(self, role: str) -> None:
        """Raise OctavError for what levels found in each tensor do not combine with."""
        what = f"{role}_format='kmeans' finds the levels with the least error"
        bits, shared = getattr(self, f"{role}_bits"), getattr(self, f"{role}_granularity")
        if bits is not None and bits not in KMEANS_BITS:
            raise OctavError(f"{what}, {KMEANS_BITS.start} to {KMEANS_BITS.stop - 1} bits of them: {role}_bits={bits}")
        if shared != "tensor":
            raise OctavError(f"{what} in a tensor: {role}_granularity={shared!r}; give 'tensor'")
        if self.scale_format != "float32":
            raise OctavError(f"{what} as float32: scale_format={self.scale_format!r}; give 'float32'")
        if self.clip not in METHODS or not METHODS[self.clip].searches:
            raise OctavError(f"{what}: clip={self.clip!r} asks for others; give 'octav' or 'mse'")

    @classmethod
    def preset(cls, name: str) -> "Config":
        """Return a configuration by its name, as it is often deployed; raise OctavError for an unknown one.

        "w4a8-g32-token" is 4 bits in groups of 32 for weights and 8 for each token of activations; "w4a16" leaves
        activations float. Clips of groups are the largest magnitudes, which are found soonest and train as well as
        those of the least error (docs/study.md).
        """
        _check_choice("preset", name, PRESETS)
        return cls(**PRESETS[name])

    @property
    def learned(self) -> str | None:
        """Return the first clip, here or in an override, that is a parameter of the model; None if none is."""
        clips = [
            self.clip,
            *(settings["clip"] for settings in self.overrides.values() if settings and "clip" in settings),
        ]
        return next((clip for clip in clips if clip in LEARNED), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; from_dict is the way back. Raises OctavError for a class in overrides."""
        self._check_named()
        return dataclasses.asdict(dataclasses.replace(self, overrides=dict(self.overrides)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Return the Config of to_dict's values; raise OctavError for a key that is not a field, and for no mapping."""
        if not isinstance(values, Mapping):
            raise OctavError(f"Config.from_dict({values!r}): a dict of fields to values")
        return cls(**{str(name): value for name, value in values.items()})

    def pattern_for(self, site: str, operand: str | None = None) -> str | None:
        """Return the override that holds for an operand of a node: its exact name, else the last that fits.

        operand None: one for the node as a whole.
        """
        self._check_named()
        patterns = list(map(str, self.overrides))
        exact = (name for name in (f"{site}/{operand}", site) if name in patterns)
        return next(exact, next((p for p in reversed(patterns) if fits(p, site, operand)), None))

    def _check_named(self) -> None:
        for pattern in self.overrides:
            if isinstance(pattern, type):
                raise OctavError(
                    f"overrides[{pattern.__name__}]: a class stands for modules of a model, which octav_fx.quantize is "
                    "given; name them here"
                )


PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "w8a8": {"weight_bits": 8, "activation_bits": 8},
    "w4a4": {},
    "w4a16-g128": {"activation_bits": None, "weight_granularity": "group-128", "clip": "max"},
    "w4a8-g32-token": {
        **{"activation_bits": 8, "weight_granularity": "group-32", "activation_granularity": "token"},
        "clip": "max",
    },
    "w8a8-token": {"weight_bits": 8, "activation_bits": 8, "activation_granularity": "token"},
    # OCP MX: groups of 32 under powers of two.
    "mxfp4": {
        **{"weight_format": "e2m1", "weight_granularity": "group-32", "scale_format": "e8m0"},
        **{"activation_format": "e2m1", "activation_granularity": "group-32"},
    },
    "mxfp8": {
        **{"weight_format": "e4m3", "weight_granularity": "group-32", "scale_format": "e8m0"},
        **{"activation_format": "e4m3", "activation_granularity": "group-32"},
    },
    "nvfp4": {
        **{"weight_format": "e2m1", "weight_granularity": "group-16", "scale_format": "e4m3"},
        **{"activation_format": "e2m1", "activation_granularity": "group-16"},
    },
    "ternary-a8": {"weight_format": "ternary", "activation_bits": 8},
    # It has no unsigned grids, and is fast only where both inputs of a sum are quantized.
    "tensorrt": {
        **{"weight_bits": 8, "activation_bits": 8, "residual_bits": 8},
        **{"signed_activations": True, "narrow_weights": True},
    },
}


def fits(pattern: str, site: str, operand: str | None) -> bool:
    """Tell whether the pattern of an override means an operand of a node, or, without an operand, the node."""
    for name in pattern.split("|"):
        place, slash, wanted = name.partition("/")
        if _matches(site, place) and (not slash or (operand is not None and fnmatch.fnmatchcase(operand, wanted))):
            return True
    return False


def _matches(site: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(site, pattern) or fnmatch.fnmatchcase(site, f"{pattern}.*")


def _check_granularity(role: str, value: Any) -> None:
    kinds = _GRANULARITIES[role]
    try:
        found = granularity(value) if isinstance(value, str) else None
    except ValueError:
        found = None
    if found is None or found.kind not in kinds or found.axis is not None:
        names = ", ".join(f"'{kind}-32' (any size)" if kind == "group" else repr(kind) for kind in kinds)
        raise OctavError(f"{role}_granularity={value!r}: one of {names}")


def _check_bits(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value not in _BITS:
        raise OctavError(f"{name}={value!r}: whole bits from {_BITS.start} to {_BITS.stop - 1}")


def _check_own_bits(role: str, name: Any, bits: int | None) -> None:
    """Raise OctavError for other bits than those that a format has."""
    form = CODEBOOKS.get(name)
    if form is not None and bits not in (None, form.bits):
        raise OctavError(
            f"{role}_bits={bits} with {role}_format={name!r}, which has {form.bits} bits: leave {role}_bits out, or "
            f"give {role}_format='int'"
        )


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if not isinstance(value, str) or value not in choices:
        raise OctavError(f"{name}={value!r}: one of {', '.join(repr(choice) for choice in choices)}")
