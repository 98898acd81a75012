"""Settings of quantizers on integer grids, as tests name them."""

from octav_fx.formats.spec import integers, spec_of
from octav_fx.nn import Settings


def settings_of(
    bits: int, signed: bool, dim: int | None, method: str, gradient: str, *, sync: bool = False
) -> Settings:
    """One clip for the tensor, or one for each index of the channel axis."""
    return Settings(spec_of(integers(bits, signed, dim)), method, gradient, sync)
