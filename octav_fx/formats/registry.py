"""Every number format by its name."""

import functools
import re
from typing import Final

from octav_fx.formats.codebook import Codebook
from octav_fx.formats.few_levels import FEW_LEVELS
from octav_fx.formats.floats import FLOATS
from octav_fx.formats.format import Format
from octav_fx.formats.grid import Grid
from octav_fx.formats.kmeans import SPELLING, KMeans
from octav_fx.formats.normal_float import NF4
from octav_fx.formats.power_law import NUPES
from octav_fx.formats.powers import POWERS

CODEBOOKS: Final[dict[str, Codebook]] = {form.name: form for form in (*FLOATS, *FEW_LEVELS, *POWERS, NF4, NUPES)}
# What Config takes: the first two have as many bits as they are asked for.
NAMES: Final = ("int", "kmeans", *CODEBOOKS)
_INTEGERS: Final = re.compile(r"(u?)int([0-9]+)(-narrow)?")


@functools.cache
def format_of(name: str) -> Format:
    """Return the Format with a name as specs spell it. Raises ValueError where there is none."""
    if found := _INTEGERS.fullmatch(name):
        return Grid(int(found[2]), not found[1], found[3] is not None)
    if found := SPELLING.fullmatch(name):
        return KMeans(int(found[1]))
    if name in CODEBOOKS:
        return CODEBOOKS[name]
    raise ValueError(f"{name!r} is no number format")
