"""What a Config decides: the Spec of an operand, and which of the passes of PREPARE run."""

from octav_fx.clips.distributed import SYNCED
from octav_fx.clips.learned import LEARNED
from octav_fx.config import Config
from octav_fx.ir.op import Role
from octav_fx.nn import Spec
from octav_fx.passes.prepare.quantize_operands import Place


def choose_spec(config: Config, place: Place) -> Spec | str:
    """Return the Spec of an operand, or why it stays float."""
    pattern = config.pattern_for(place.site)
    settings = {} if pattern is None else config.overrides[pattern]
    if settings is None:
        return f"override {pattern!r}: None"
    is_weight = place.role is Role.WEIGHT
    bits_name = "weight_bits" if is_weight else "activation_bits"
    default = config.edge_bits if place.edge and config.edge_bits is not None else getattr(config, bits_name)
    gradient_name = "weight_gradient" if is_weight else "activation_gradient"
    method = settings.get("clip", config.clip)
    if method == "pact" and is_weight:
        # PACT learns the clips of activations.
        method = "max"
    gradient = "pwl" if method in LEARNED else settings.get(gradient_name, getattr(config, gradient_name))
    return Spec(
        bits=settings.get(bits_name, default),
        signed=place.signed,
        dim=place.dim,
        method=method,
        gradient=gradient,
        sync=config.sync_clip and not is_weight and method in SYNCED,
    )
