"""Formats as the C++ passes know them (levels.h): a struct for each, made once."""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, Final

import torch

from octav_fx.formats.codebook import Codebook
from octav_fx.formats.floats import FloatFormat
from octav_fx.formats.format import Format
from octav_fx.formats.grid import Grid
from octav_fx.formats.kmeans import KMeans
from octav_fx.formats.scales import SCALES

# The codes of levels.h.
EVEN, FLOATING_POINT, TABLE_OF_4, TABLE_OF_16 = range(4)
SCALE_CODES: Final = {name: code for code, name in enumerate(SCALES)}

_FLOATS: Final = ctypes.POINTER(ctypes.c_float)


class Levels(ctypes.Structure):
    """The struct of levels.h."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("least", ctypes.c_float),
        ("greatest", ctypes.c_float),
        ("steps", ctypes.c_float),
        ("low", ctypes.c_int),
        ("high", ctypes.c_int),
        ("mantissa_bits", ctypes.c_int),
        ("least_exponent", ctypes.c_int),
        ("levels", _FLOATS),
        ("edges", _FLOATS),
    )


def floats(values: Sequence[float]) -> Any:
    """Return an array of C floats; whoever hands it to a pass keeps it alive."""
    return (ctypes.c_float * len(values))(*values)


def levels_of(form: Format) -> Levels | None:
    """Return a format as the passes know it; None if they do not, or its levels are not known yet."""
    if isinstance(form, KMeans):
        # Those of one tensor at one step.
        return None if form.table is None else _table(form.table.tolist(), form)
    return _always_the_same(form)


@functools.cache
def _always_the_same(form: Format) -> Levels | None:
    if isinstance(form, Grid):
        return Levels(kind=EVEN, **_shared(form))
    if isinstance(form, FloatFormat):
        exponents = {"mantissa_bits": form.mantissa_bits, "least_exponent": form.least_exponent}
        return Levels(kind=FLOATING_POINT, **_shared(form), **exponents, levels=floats(form.table))
    if isinstance(form, Codebook) and len(form.table) <= 16:
        return _table(form.table, form)
    return None


def _table(levels: Sequence[float], form: Codebook | KMeans) -> Levels:
    kind, edges = TABLE_OF_4 if len(levels) <= 4 else TABLE_OF_16, form.edges(torch.float32).tolist()
    return Levels(kind=kind, **_shared(form), levels=floats(levels), edges=floats(edges))


def _shared(form: Format) -> dict[str, float]:
    return {"least": form.least, "greatest": form.greatest, "steps": form.steps, "low": form.low, "high": form.high}
