"""What a Config decides: the Settings of an operand, and which of the passes of PREPARE run."""

import textwrap
from collections.abc import Mapping
from typing import Any

from octav_fx.clips.learned import LEARNED
from octav_fx.clips.methods import SYNCED
from octav_fx.config import Config
from octav_fx.errors import OctavError
from octav_fx.formats.granularity import TENSOR, Granularity, granularity
from octav_fx.formats.grid import Grid
from octav_fx.formats.registry import format_of
from octav_fx.formats.spec import Spec
from octav_fx.ir.op import Role
from octav_fx.nn import Settings
from octav_fx.passes.prepare.quantize_operands import Place


def choose_spec(config: Config, place: Place) -> Settings | str:
    """Return the Settings of an operand, or why it stays float."""
    pattern = config.pattern_for(place.site, place.operand)
    settings = {} if pattern is None else config.overrides[pattern]
    if settings is None:
        return f"override {textwrap.shorten(str(pattern), 60, placeholder='...')!r}: None"
    role = "weight" if place.role is Role.WEIGHT else "activation"
    bits = settings.get(f"{role}_bits", getattr(config, f"{role}_bits"))
    if bits is None:
        return f"{role}_bits=None"
    method = settings.get("clip", config.clip)
    if method == "pact" and role == "weight":
        # PACT learns the clips of activations.
        method = "max"
    name = f"{role}_gradient"
    # The largest values decide what a global pool returns. Without their gradients nets lose accuracy (docs/study.md).
    usual = "ste" if place.pooled else getattr(config, name)
    gradient = "pwl" if method in LEARNED else settings.get(name, usual)
    spec = _spec(config, settings, place, role)
    # A row of an activation lies on one rank.
    sync = config.sync_clip and role == "activation" and method in SYNCED and not spec.granularity.is_short
    return Settings(spec, method, gradient, sync)


def _spec(config: Config, settings: Mapping[str, Any], place: Place, role: str) -> Spec:
    """Return how numbers are represented; edges and residuals are integers in no groups, where an override says not."""
    exception = config.residual_bits if place.residual else config.edge_bits if place.edge else None

    def value(name: str, of_exception: Any) -> Any:
        return settings.get(name, getattr(config, name) if exception is None else of_exception)

    bits, name = value(f"{role}_bits", exception), value(f"{role}_format", "int")
    usual = "channel" if role == "weight" else "tensor"
    of_config = getattr(config, f"{role}_granularity")
    shared = value(f"{role}_granularity", usual if of_config.startswith("group") else of_config)
    signed = place.signed or settings.get("signed_activations", config.signed_activations)
    narrow = role == "weight" and settings.get("narrow_weights", config.narrow_weights)
    form = Grid(bits, signed, narrow) if name == "int" else format_of(f"kmeans{bits}" if name == "kmeans" else name)
    return Spec(form, _granularity(shared, place), value("scale_format", "float32"))


def _granularity(name: str, place: Place) -> Granularity:
    """Return the granularity with the axis that it has for an operand."""
    asked = granularity(name)
    if place.residual or asked.kind == "tensor" or (asked.kind == "channel" and place.dim is None):
        return TENSOR
    if asked.kind == "channel":
        return Granularity("channel", place.dim)
    where = f"{place.site}: {place.operand} of shape {place.shape}"
    leave = f"leave it float with overrides={{{place.site!r}: None}}"
    if place.reduction is None:
        raise OctavError(f"{where} has no one axis that {place.op} sums over, which {name!r} needs; {leave}")
    found = Granularity(asked.kind, place.reduction, asked.size)
    if not found.divides(place.shape):
        raise OctavError(
            f"{where} has {place.shape[place.reduction]} elements along axis {place.reduction}, which groups of "
            f"{asked.size} do not divide; choose another group there, or {leave}"
        )
    return found
